"""Names in a message: the first ones, and how many more there are."""

from collections.abc import Iterable


def listing(names: Iterable[str], most: int = 5, between: str = ", ") -> str:
    """The first names as text, such as "a, b, and 3 more".

    Args:
        names: Of anything.
        most: So many are shown.
        between: What stands between two of them.
    """
    names = list(names)
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return between.join([*names[:most], *more])
