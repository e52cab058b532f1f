"""Lists names in a message: the first few, and how many more there are."""

from collections.abc import Iterable


def listing(names: Iterable[str], most: int = 5, between: str = ", ") -> str:
    """The first names as text, such as "a, b, and 3 more".

    Args:
        names: The names to list.
        most: How many to show.
        between: The separator.
    """
    names = list(names)
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return between.join([*names[:most], *more])
