"""``python -m metareg.testing ALGORITHM AUGMENTER``: the checks of one combination, as a line of JSON."""

from __future__ import annotations

import json
import sys

from metareg.errors import MetaregError
from metareg.testing import NOT_APPLICABLE, Combination


def main(arguments: list[str]) -> int:
    """Check one combination; ``none`` means no augmenter.

    Returns:
        0 if it passes, 1 if a check fails, 2 for wrong use.
    """
    if len(arguments) != 2:
        print("usage: python -m metareg.testing ALGORITHM AUGMENTER", file=sys.stderr)
        return 2
    try:
        found = Combination(*arguments).check()
    except MetaregError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(found))
    return int(any(problem not in (None, NOT_APPLICABLE) for problem in found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
