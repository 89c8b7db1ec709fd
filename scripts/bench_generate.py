"""generate() of transformers and of moetk in turn, in one process.

    python scripts/bench_generate.py --layers 8 --batch 1 --out scripts/results
    python scripts/bench_generate.py --batch 32 --cache static

The options are those of  moetk bench generate --help.
"""

import sys

from moetk.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["bench", "generate"]
    main()
