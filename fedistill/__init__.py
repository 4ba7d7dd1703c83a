"""fedistill: hospitals send a lesson, not their images.

import fedistill
synthetic = fedistill.distill(images, labels, ipc=10)   # tensors in, a torch Dataset out
synthetic = fedistill.load_set("set/")                  # a set that was distilled before
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedistill.api import distill as distill
    from fedistill.synthetic.set import SyntheticSet as SyntheticSet
    from fedistill.synthetic.store import load_set as load_set

__version__ = "0.1.0"
__all__ = ["SyntheticSet", "distill", "load_set"]


def __getattr__(name: str) -> Any:
    # torch takes a second to import: the command line's --help should not wait for it
    if name == "distill":
        from fedistill.api import distill

        return distill
    if name == "load_set":
        from fedistill.synthetic.store import load_set

        return load_set
    if name == "SyntheticSet":
        from fedistill.synthetic.set import SyntheticSet

        return SyntheticSet
    raise AttributeError(f"module 'fedistill' has no attribute '{name}'")
