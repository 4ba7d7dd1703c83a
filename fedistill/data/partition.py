"""Who holds which image: real sites, or an artificial division of one data set over several sites."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedistill.config import Config
from fedistill.data.assemble import SPLITS
from fedistill.data.dataset import Dataset
from fedistill.errors import FedistillError, unknown

KINDS = ("auto", "site", "iid", "dirichlet", "quantity")
_SMALLEST = 2  # training images that every site of a random partition gets
_DRAWS = 5000  # at alpha 0.05 one in 600 divides two classes over ten sites


@dataclass(frozen=True)
class Partition:
    """Positions in the data set, for each site of `names`: `index[i]["train"]` `(k,)` int64, likewise val and test.

    Every training image is at exactly one site; an explicit partition from a file may leave images out.
    """

    names: tuple[str, ...]
    index: tuple[dict[str, Tensor], ...]

    def __len__(self) -> int:
        return len(self.names)

    def at(self, data: Dataset, place: int) -> Dataset:
        """What site number `place` holds of `data`."""
        return data.at(self.index[place], self.names[place])


def partition(data: Dataset, config: Config) -> Partition:
    """Divide `data` as `config.partition`, `config.sites`, `config.alpha` and `config.seed` say.

    `site` follows the real sites. The others are random and reproducible: `iid` gives every site the same number and
    class mix; `dirichlet` draws the share of each class over the sites from Dir(alpha); `quantity` draws the sizes of
    the sites from Dir(alpha) with the same class mix. There, val and test are divided IID, and an image with several
    findings counts for the first. A path to a `.json` file gives the indices themselves. Where val or test were cut out of
    the training images, its training indices count all of these, and a site has for val and test what was cut away of its
    own. Raises `FedistillError` when the partition is impossible, naming the way out.
    """
    kind = config.partition
    if kind == "auto":
        real = len(data.site_names) > 1 and config.sites in (0, len(data.site_names))
        kind = "site" if real else "iid"
    if kind == "site":
        return _by_site(data, config.sites)
    if is_file(config):
        return _from_file(data, Path(kind).expanduser(), config.sites)

    sites = config.sites or 3
    n = len(data.train)
    if n < _SMALLEST * sites:
        raise FedistillError(
            "too-many-sites",
            f"sites={sites} is too many for {n} training images: each site needs at least {_SMALLEST}.",
        )
    generator = torch.Generator().manual_seed(config.seed)
    labels = data.train.groups
    if kind == "iid":
        train = _divide(labels, torch.full((sites,), 1 / sites, dtype=torch.float64), generator)
    elif kind == "quantity":
        train = _redraw(lambda: _divide(labels, _dirichlet(sites, config.alpha, generator), generator), config, sites)
    else:
        train = _redraw(lambda: _dirichlet_by_class(labels, sites, config.alpha, generator), config, sites)
    even = torch.full((sites,), 1 / sites, dtype=torch.float64)
    owners = {"train": train}
    owners |= {key: _divide(data.splits[key].groups, even, generator) for key in ("val", "test")}
    return _collect(tuple(f"site-{i + 1}" for i in range(sites)), owners)


def is_file(config: Config) -> bool:
    """Whether the partition is a file of indices. Raises `FedistillError` where it is neither that nor one of `KINDS`."""
    kind = config.partition
    if kind not in KINDS and not kind.lower().endswith(".json"):
        raise unknown("partition", kind, (*KINDS, "a .json file"))
    return kind not in KINDS


def _by_site(data: Dataset, sites: int) -> Partition:
    names = data.site_names
    if len(names) < 2:
        raise FedistillError(
            "one-site", f"partition=site needs several real sites, but {data.name} has one: choose iid or dirichlet."
        )
    if sites not in (0, len(names)):
        raise FedistillError(
            "sites-differ",
            f"sites={sites}, but {data.name} has {len(names)} real sites ({', '.join(names)}): leave sites at 0.",
        )
    for place, count in enumerate(torch.bincount(data.train.site, minlength=len(names)).tolist()):
        if count == 0:
            raise FedistillError(
                "empty-site",
                f"The site '{names[place]}' of {data.name} has no training image: take it out of the data.",
            )
    return _collect(names, {key: split.site for key, split in data.splits.items()})


def _collect(names: tuple[str, ...], owners: Mapping[str, Tensor]) -> Partition:
    """The partition in which image i of a split belongs to site `owners[split][i]`."""
    index = tuple(
        {key: torch.nonzero(owner == place).flatten() for key, owner in owners.items()} for place in range(len(names))
    )
    return Partition(names, index)


def _divide(labels: Tensor, shares: Tensor, generator: torch.Generator) -> Tensor:
    """The site of each image, `(n,)`: sizes in proportion to `shares` `(sites,)`, the class mix alike everywhere."""
    n = len(labels)
    shuffled = torch.randperm(n, generator=generator)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    # Low-discrepancy dealing: site j takes its turns at even distances, so every stretch of the sorted images, and so
    # every class, is divided in proportion.
    counts = _rounded(shares, n)
    sites = torch.repeat_interleave(torch.arange(len(shares)), counts)
    start = torch.rand(len(shares), dtype=torch.float64, generator=generator)
    turn = torch.cat([(torch.arange(int(c)) + s) / c for c, s in zip(counts, start, strict=True)])
    owner = torch.empty(n, dtype=torch.int64)
    owner[by_class] = sites[turn.argsort(stable=True)]
    return owner


def _dirichlet_by_class(labels: Tensor, sites: int, alpha: float, generator: torch.Generator) -> Tensor:
    """The site of each image, `(n,)`, with shares drawn anew for each class."""
    owner = torch.empty(len(labels), dtype=torch.int64)
    for k in range(int(labels.max()) + 1):
        members = torch.nonzero(labels == k).flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        counts = _rounded(_dirichlet(sites, alpha, generator), len(members))
        owner[members] = torch.repeat_interleave(torch.arange(sites), counts)
    return owner


def _dirichlet(sites: int, alpha: float, generator: torch.Generator) -> Tensor:
    """One draw from the symmetric Dir(alpha), `(sites,)` float64.

    In logarithms, by Gamma(a) = Gamma(a + 1) * U^(1/a), because for small alpha every plain draw may underflow to 0.
    """
    # torch's Dirichlet takes no generator; its gamma sampler does.
    gamma = torch._standard_gamma(torch.full((sites,), alpha + 1, dtype=torch.float64), generator=generator)
    uniform = torch.rand(sites, dtype=torch.float64, generator=generator).clamp_min(1e-300)
    return torch.softmax(gamma.log() + uniform.log() / alpha, dim=0)


def _rounded(shares: Tensor, n: int) -> Tensor:
    """Whole numbers in proportion to `shares` that add up to `n`, by largest remainders."""
    wanted = shares / shares.sum() * n
    counts = wanted.floor().long()
    counts[(wanted - counts).argsort(descending=True, stable=True)[: n - int(counts.sum())]] += 1
    return counts


def _redraw(draw: Callable[[], Tensor], config: Config, sites: int) -> Tensor:
    """The first draw in which no site is left with too few training images."""
    for _ in range(_DRAWS):
        owner = draw()
        if int(torch.bincount(owner, minlength=sites).min()) >= _SMALLEST:
            return owner
    raise FedistillError(
        "empty-site",
        f"In {_DRAWS} draws with partition={config.partition}, alpha={config.alpha:g} and sites={sites} some site "
        f"always had fewer than {_SMALLEST} training images: choose a larger alpha or fewer sites.",
    )


def _from_file(data: Dataset, path: Path, sites: int) -> Partition:
    """Explicit indices; see `_named` for the formats. Val and test are divided IID by a fixed seed when not given.

    Splits that were cut out of the training images follow the training indices: nobody can know where the cut was.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unrepeated)
    except FileNotFoundError:
        raise FedistillError("missing-file", f"partition={path}: there is no such file.") from None
    except _Repeated as repeated:
        raise FedistillError("bad-partition", f"{path} has two entries called '{repeated}': keep one.") from None
    except (OSError, ValueError, RecursionError):
        raise FedistillError("bad-partition", f"{path} is not a readable JSON file.") from None
    named = _named(path, content)
    if sites not in (0, len(named)):
        raise FedistillError("sites-differ", f"sites={sites}, but {path} has {len(named)} sites: leave sites at 0.")
    names = tuple(named)
    rows = {key: split.row for key, split in data.splits.items() if split.row is not None}
    owners = {}
    for key, split in data.splits.items():
        said = any(key in lists for lists in named.values())
        if key in rows and key != "train":
            if said:
                raise FedistillError(
                    "bad-partition",
                    f"{path} lists images of {key}, but {data.name} has no such split: list them in train, from which it is cut.",
                )
        elif said:
            n = 1 + max(int(row.max()) for row in rows.values()) if key in rows else len(split)
            owners[key] = _owners(named, key, n, path)
        else:
            even = torch.full((len(names),), 1 / len(names), dtype=torch.float64)
            owners[key] = _divide(split.groups, even, torch.Generator().manual_seed(0))
    owners |= {key: owners["train"][row] for key, row in rows.items()}
    for place, name in enumerate(names):
        if not (owners["train"] == place).any():
            raise FedistillError(
                "bad-partition",
                f"{path}, site '{name}', train: all of its images were set aside for validation and test: list more.",
            )
    return _collect(names, owners)


def _owners(named: Mapping[str, Mapping[str, Any]], key: str, n: int, path: Path) -> Tensor:
    """The site of each of the `n` images that the lists called `key` count, `(n,)`; -1 where nobody lists it."""
    owner = [-1] * n
    names = tuple(named)
    for place, name in enumerate(names):
        where = f"{path}, site '{name}', {key}"
        if key not in named[name]:
            raise FedistillError("bad-partition", f"{where}: missing, although other sites list theirs.")
        _claim(owner, named[name][key], place, names, where)
    return torch.tensor(owner, dtype=torch.int64)


def _claim(owner: list[int], listed: Any, place: int, names: Sequence[str], where: str) -> None:
    """Write `place` at each listed position of `owner`, which holds -1 where nobody has claimed yet."""
    if not isinstance(listed, list) or any(type(i) is not int for i in listed):
        raise FedistillError("bad-partition", f"{where}: the indices must be a list of whole numbers.")
    if not listed and where.endswith("train"):
        raise FedistillError("bad-partition", f"{where}: the list is empty, but a site needs training images.")
    for i in listed:
        if not 0 <= i < len(owner):
            raise FedistillError(
                "bad-partition", f"{where}: index {i} is out of range, the split has {len(owner)} images (from 0)."
            )
        if owner[i] >= 0:
            twice = "twice" if owner[i] == place else f"also at site '{names[owner[i]]}'"
            raise FedistillError("bad-partition", f"{where}: index {i} is listed {twice}.")
        owner[i] = place


class _Repeated(Exception):
    """A name that a JSON object holds twice; the plain reader would keep the last and drop the first."""


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise _Repeated(name)
        content[name] = value
    return content


def _named(path: Path, content: Any) -> dict[str, dict[str, Any]]:
    """Site name to split name to indices, from any of

    {"north": [0, 1], ...}                                        training indices
    {"north": {"train": [...], "val": [...], "test": [...]}, ...}
    {"client_idx": [[...], ...], "client_classes": ...}           as FedVCK writes it; training indices
    """
    if isinstance(content, dict) and "client_idx" in content:
        clients = content["client_idx"]
        if isinstance(clients, dict):
            clients = list(clients.values())
        if not isinstance(clients, list):
            raise FedistillError("bad-partition", f"{path}: 'client_idx' must be a list with one list per site.")
        content = {f"site-{i + 1}": indices for i, indices in enumerate(clients)}
    if not isinstance(content, dict) or not content:
        raise FedistillError("bad-partition", f'{path} must hold {{"name of a site": [training indices], ...}}.')
    named = {}
    for name, lists in content.items():
        if not isinstance(lists, dict):
            lists = {"train": lists}
        for key in lists:
            if key not in SPLITS:
                raise unknown("split", key, SPLITS)
        if "train" not in lists:
            raise FedistillError("bad-partition", f"{path}, site '{name}': there are no training indices ('train').")
        named[name] = lists
    return named
