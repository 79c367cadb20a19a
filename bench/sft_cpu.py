"""SFT on two CPU cores against TRL + PEFT: `python -m bench.sft_cpu ragged|uniform [--large]`.

Ragged rows are lognormal (median 200, sigma 0.9, 50 to 2000 tokens), uniform ones have 512. Real tokens are counted.
"""

import argparse

from bench import training
from bench.toy import ragged_lengths, random_rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.sft_cpu", description=__doc__)
    parser.add_argument("rows", choices=("ragged", "uniform"))
    parser.add_argument("--large", action="store_true", help="hidden 512 and 8 layers instead of 256 and 4")
    parser.add_argument("--rows-per-step", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    size = (512, 8) if options.large else (256, 4)
    requests = []
    for seed in range(training.WARM_UP + options.steps):
        count = 2 if seed == 0 else options.rows_per_step
        lengths = ragged_lengths(count, seed) if options.rows == "ragged" else [512] * count
        requests.append({"rows": random_rows(lengths, seed)})
    units = [sum(map(len, request["rows"])) for request in requests]
    name = f"sft_cpu_{options.rows}_{size[0]}x{size[1]}"
    training.run(name, "sft", "tok", size, requests, units, full=not options.large)


if __name__ == "__main__":
    main()
