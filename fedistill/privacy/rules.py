"""When a set is private: what is refused before work starts, and the ten conditions that a release answers to.

By post-processing, a set is as private as the plan says if and only if nothing after the plan's mechanisms depends on the
records. Each condition below is enforced by a check in this code, or declared, and says which.
"""

from __future__ import annotations

from typing import Any

from fedistill.config import Config
from fedistill.errors import FedistillError
from fedistill.experts.train import architectures_of
from fedistill.methods.registry import method_of
from fedistill.privacy.accounting import upwards
from fedistill.privacy.plan import Plan


def check_private(config: Config) -> None:
    """Raise `FedistillError` where settings of privacy contradict each other, or would let something private out."""
    if config.privacy == "none":
        for name in ("epsilon", "delta", "eval_epsilon"):
            if getattr(config, name):
                raise FedistillError(
                    "privacy-off",
                    f"{name}={getattr(config, name):g} has no effect without privacy=dp: add --privacy dp.",
                )
        if config.unit != "image":
            raise FedistillError(
                "privacy-off", f"unit={config.unit} has no effect without privacy=dp: add --privacy dp."
            )
        return
    if not config.epsilon:
        raise FedistillError("no-budget", "privacy=dp needs a budget: say --epsilon, for example 10, 3 or 1.")
    method = method_of(config)
    if method.sees_images:
        raise _refused(
            f"method={config.method}", "it reads real images while it distils: use sketch, teach or trajectory matching"
        )
    if config.init == "real":
        raise _refused(
            "init=real", "patients' pixels would be in the set, and no noise repairs that: use noise or phantom"
        )
    if config.budget != "equal":
        raise _refused(f"budget={config.budget}", "how many images a class has is private: use equal")
    if config.overlap == "on":
        raise _refused("overlap=on", "its limits are measured on real images: use auto or off")
    if method.sketch and config.rounds > 1:
        raise FedistillError(
            "not-for-method", f"rounds={config.rounds} needs trajectory matching: use ptm, or one round."
        )
    if method.sketch and method.soft_labels:
        raise FedistillError(
            "not-for-method", "labels=soft asks private experts, and method=sketch has none: use labels=hard, or teach."
        )
    if method.experts and len({*architectures_of(config)}) > 1:
        raise _refused(f"model={config.model}", "private experts are averaged, which takes one architecture: name one")


def _refused(what: str, why: str) -> FedistillError:
    return FedistillError("not-private", f"{what} cannot be private: {why}.")


def statement_of(config: Config, plan: Plan) -> dict[str, Any]:
    """The privacy part of a set's manifest. Never a seed of noise or sampling: nobody has one."""
    person = "image" if plan.unit == "image" else "patient"
    text = (
        f"({upwards(plan.first.epsilon)}, {plan.first.delta:g})-differential privacy for every {person} of this site's training "
        f"images, under the declared conditions. The number of {person}s is treated as public."
    )
    if plan.unit == "image":
        text += " A patient with k images has k times the epsilon, at worst."
    return plan.to_dict() | {
        "clip_norm": plan.mechanisms[-1].clip_norm,
        "conditions": conditions(config),
        "public": [
            "the names of the classes, the kind of task, the modality and the size of the images",
            "procedural phantoms centre the features of sketches, and are the probes of method=teach",
        ],
        "not_covered": [
            "settings that were tuned on these very records",
            "which records are for training, validation or test: neighbouring data sets are divided alike",
            "floating-point noise beyond the remedy of Holohan and Braghin (sums of four draws), and Torch's generator, which is "
            "no cryptographic one",
            "side channels such as the time that work takes",
            "facts about the group of patients as a whole, which differential privacy does not hide",
        ],
        "statement": text,
    }


def conditions(config: Config) -> list[dict[str, Any]]:
    """The ten conditions: number, name, status (passed, declared or not-applicable), and how it is kept."""
    sketched = method_of(config).sketch

    def one(number: int, name: str, status: str, how: str) -> dict[str, Any]:
        return {"number": number, "name": name, "status": status, "how": how}

    return [
        one(1, "the first parameters are free of data", "passed", "drawn from a public seed"),
        one(2, "the first images are free of data", "passed", f"init={config.init}; init=real is refused"),
        one(
            3,
            "all mechanisms compose",
            "passed",
            "one composition of every sum over records, on the ledger before the first; training stops at its last step",
        ),
        one(4, "normalisation is public", "passed", "constants of the modality, in code; no other can be given"),
        one(
            5,
            "class counts are private",
            "passed",
            "noisy counts, paid for within epsilon; the same budget for every class; the number of records is declared public",
        ),
        one(6, "settings were not tuned on these records", "declared", "the code cannot know"),
        one(
            7,
            "nothing is selected by private figures",
            "passed",
            "distillation is given the noisy results alone and stops after a fixed number of iterations",
        ),
        one(
            8,
            "figures that leave are paid for",
            "passed",
            "losses are of private experts or sketches; answers on test images are noisy counts"
            + (f" at eval_epsilon={config.eval_epsilon:g}" if config.eval_epsilon else ", and none are sent"),
        ),
        one(
            9,
            "sampling is what the accountant assumes",
            "passed",
            "every record once" if sketched else "a coin per record and step (Poisson); empty steps add their noise",
        ),
        one(10, "randomness is fresh and secret", "passed", "seeded by the operating system, never stored"),
    ]
