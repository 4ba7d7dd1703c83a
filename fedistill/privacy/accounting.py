"""The (epsilon, delta) of what was done to a site's data, and the noise that a given epsilon needs.

Everything that touches private records is a sequence of Poisson-subsampled Gaussian mechanisms, so one composition covers
expert training, sketches and noisy counts. Two accountants look at it: Opacus' PRV accountant (Gopi et al., NeurIPS 2021),
whose answer is used, and Google's PLD accountant where `dp-accounting` is installed. The Gaussian accountant (GDP) is not
offered: under subsampling it says too little.
"""

from __future__ import annotations

import functools
import math
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from fedistill.errors import FedistillError

PRECISION = 0.01  # of PRV, which errs upwards
AGREEMENT = 0.02  # between the two accountants
HOPELESS = 100.0  # an epsilon above it protects nobody: RDP says so at once, where PRV can hang
PATIENCE = 120.0  # seconds for an accountant
MOST_NOISE = 1e5


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """`steps` noisy sums over records, each of which contributes at most `clip_norm` in L2 norm.

    sample_rate: probability with which a record takes part in one sum (Poisson sampling; 1: every record in every sum).
    noise_multiplier: deviation of the Gaussian noise of a sum, in units of `clip_norm`.
    """

    name: str
    sample_rate: float
    noise_multiplier: float
    steps: int
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        bounded = 0 < self.noise_multiplier < math.inf and 0 < self.clip_norm < math.inf
        if not (0 < self.sample_rate <= 1 and bounded and self.steps > 0):
            raise ValueError(f"not a mechanism: {self}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Accounted:
    """epsilon at `delta`, and the name and version of who says so."""

    epsilon: float
    delta: float
    accountant: str


def in_words(mechanism: Mechanism) -> str:
    """One line on a mechanism, for people."""
    m = mechanism
    sums = "1 sum" if m.steps == 1 else f"{m.steps} sums"
    records = "all records" if m.sample_rate == 1 else f"{100 * m.sample_rate:.3g} % of the records"
    return f"{m.name}: {sums} over {records}, noise {m.noise_multiplier:g}, clip {m.clip_norm:g}"


def auto_delta(records: int) -> float:
    """The power of ten below 1/records: strictly less than 1/n, and telling only the order of magnitude of n."""
    return 10.0 ** -(math.floor(math.log10(max(records, 1))) + 1)


def upwards(epsilon: float) -> str:
    """Epsilon with two decimals, never less than it is."""
    return f"{math.ceil(epsilon * 100 - 1e-9) / 100:.2f}"


def epsilon_of(mechanisms: Sequence[Mechanism], delta: float) -> Accounted:
    """Epsilon of the composition of `mechanisms` at `delta`, for records that are added, removed or zeroed out.

    PRV; RDP, which is valid but 10 to 15 % looser, where PRV fails or takes longer than `PATIENCE`.
    Raises `FedistillError` where neither gives a finite epsilon.
    """
    if not mechanisms:
        return Accounted(epsilon=0.0, delta=delta, accountant="none")
    history = _history(mechanisms)
    found, name = _rdp(history, delta), "RDP"
    if found is None or found < HOPELESS:
        tighter = _prv(history, delta)
        found, name = (found, name) if tighter is None else (tighter, "PRV")
    if found is None:
        raise FedistillError("no-epsilon", "No finite epsilon can be shown: raise the noise, or lower the steps.")
    return Accounted(epsilon=found, delta=delta, accountant=f"opacus {version('opacus')} {name}")


def cross_check(mechanisms: Sequence[Mechanism], delta: float) -> Accounted | None:
    """What Google's PLD accountant says; None where `dp-accounting` is not installed (`pip install fedistill[privacy]`).

    Raises `FedistillError` where it says nothing within `PATIENCE`, or no finite epsilon.
    """
    try:
        import dp_accounting as dpa
        from dp_accounting.pld import PLDAccountant
    except ImportError:
        return None

    def ask() -> float:
        accountant = PLDAccountant()
        for m in mechanisms:
            gaussian = dpa.GaussianDpEvent(m.noise_multiplier)
            event = gaussian if m.sample_rate == 1 else dpa.PoissonSampledDpEvent(m.sample_rate, gaussian)
            accountant.compose(event, m.steps)
        return float(accountant.get_epsilon(delta))

    found = _in_time(ask)
    if found is None:
        raise FedistillError("no-epsilon", "The second accountant shows no finite epsilon for its mechanisms.")
    return Accounted(epsilon=found, delta=delta, accountant=f"dp-accounting {version('dp-accounting')} PLD")


def agree(first: Accounted, second: Accounted) -> bool:
    """Whether two accountants tell the same story: RDP may only be looser."""
    if "RDP" in first.accountant:
        return second.epsilon <= first.epsilon + PRECISION
    return abs(first.epsilon - second.epsilon) <= AGREEMENT


def calibrate(
    epsilon: float, delta: float, *, sample_rate: float, steps: int, before: Sequence[Mechanism] = ()
) -> float:
    """The least noise multiplier with which `steps` sums, composed with all of `before`, stay within `epsilon`.

    To a thousandth, and rounded upwards: what it returns never overshoots. Raises `FedistillError` where no noise does.
    """

    def spends(sigma: float) -> float:
        this = Mechanism(name="", sample_rate=sample_rate, noise_multiplier=sigma, steps=steps)
        return epsilon_of([*before, this], delta).epsilon

    hopeless = FedistillError(
        "too-little-epsilon", f"No noise is enough for epsilon={epsilon:g} at delta={delta:g}: ask for more."
    )
    low, high = 0.0, 1.0
    while spends(high) > epsilon:
        low, high = high, 2 * high
        if high > MOST_NOISE:
            raise hopeless
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        if middle < 0.05 or spends(middle) > epsilon:  # below that no accountant is asked: it would take minutes
            low = middle
        else:
            high = middle
    sigma = math.ceil(high * 1e4) / 1e4
    # The accountant's error has steps: at a very small delta a little more noise can be said to spend a little more.
    while spends(sigma) > epsilon:
        sigma = math.ceil(1.0005 * sigma * 1e4) / 1e4
        if sigma > MOST_NOISE:
            raise hopeless
    return sigma


def _history(mechanisms: Sequence[Mechanism]) -> tuple[tuple[float, float, int], ...]:
    """Noise, rate and steps; equal sums in one place, so that the answer depends on no order and forty rounds cost one."""
    steps: Counter[tuple[float, float]] = Counter()
    for m in mechanisms:
        steps[m.noise_multiplier, m.sample_rate] += m.steps
    return tuple((sigma, rate, count) for (sigma, rate), count in sorted(steps.items()))


@functools.lru_cache(maxsize=4096)
def _prv(history: tuple[tuple[float, float, int], ...], delta: float) -> float | None:
    from opacus.accountants import PRVAccountant

    def ask() -> float:
        accountant = PRVAccountant()
        accountant.history = list(history)
        return float(accountant.get_epsilon(delta, eps_error=PRECISION))

    return _in_time(ask)


@functools.lru_cache(maxsize=4096)
def _rdp(history: tuple[tuple[float, float, int], ...], delta: float) -> float | None:
    from opacus.accountants import RDPAccountant

    def ask() -> float:
        accountant = RDPAccountant()
        accountant.history = list(history)
        return float(accountant.get_epsilon(delta))

    return _in_time(ask)


def _in_time(ask: Callable[[], float]) -> float | None:
    """The finite, non-negative answer of `ask`; None where it raises, or does not answer within `PATIENCE`."""
    answers: list[float] = []

    def work() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                answers.append(ask())
            except Exception:  # an accountant's own limits (overflow, memory): the other one is asked then
                return

    thread = threading.Thread(target=work, daemon=True)  # it cannot be stopped, and must not keep the process
    thread.start()
    thread.join(PATIENCE)
    return answers[0] if answers and math.isfinite(answers[0]) and answers[0] >= 0 else None
