"""What the garbage collector has to look through in a process that serves."""

import gc


def freeze_heap() -> None:
    """Leaves all that is there now out of later collections.

    Torch and Ray alone are some 200,000 objects: looking through them all stops every thread of an actor for 0.1 to 0.4 s, in the middle of its step.
    """
    gc.freeze()
