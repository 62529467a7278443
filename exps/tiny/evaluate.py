"""Examines a tiny model through the library: exact answers per kind, against the bars that it must clear.
Must not know how it was trained; its questions come from the exam's own seed."""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

if find_spec("accessory") is None:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import exam
import torch

from accessory import assemble, dist
from accessory.engine import Engine, Request

SEED = 2026  # never trained on
ROWS = 128  # questions answered at once
# group -> (least, most) per cent of exact answers
BARS = {
    "scene": (95.0, 100.0),
    "digit": (97.0, 100.0),
    "negative": (90.0, 100.0),
    "swapped": (0.0, 49.9),
    "parity": (90.0, 100.0),
}
TITLES = {
    "scene": "fresh drawn scenes",
    "digit": "held-out handwriting",
    "negative": "to be declined",
    "swapped": "scenes, pictures swapped",
    "other": "besides, under no bar",
    "parity": "even or odd, finetuned",
}


def ask(engine: Engine, cases: list[exam.Case]) -> list[str]:
    """Greedy answers."""
    requests = [
        Request(case.question, pictures=[] if case.picture is None else [case.picture], max_gen_len=64)
        for case in cases
    ]
    return [result.text.strip() for result in engine.generate(requests)]


def report(cases: list[exam.Case], answers: list[str], *, mistakes: int) -> bool:
    """Print the table; whether every bar is cleared."""
    right: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for case, answer in zip(cases, answers, strict=True):
        right[case.group, case.kind].append(answer == case.answer)
        if answer != case.answer and case.group != "swapped" and mistakes > 0:
            mistakes -= 1
            print(f"  {case.kind}: {case.question!r} -> {answer!r}, expected {case.answer!r}")
    passed = True
    for group, title in TITLES.items():
        if not any(its == group for its, _ in right):
            continue
        kinds = {kind: marks for (its, kind), marks in right.items() if its == group}
        marks = [mark for each in kinds.values() for mark in each]
        rate = 100 * sum(marks) / max(1, len(marks))
        low, high = BARS.get(group, (0.0, 100.0))
        cleared = low <= rate <= high
        passed = passed and cleared
        bar = "" if group not in BARS else f"bar: {f'at least {low:g}' if low else 'below 50'} %"
        print(f"{title:<28}{len(marks):>6}{rate:>8.1f} %  {bar}{'' if cleared else '  MISSED'}")
        for kind, its in kinds.items():
            print(f"  {kind:<26}{len(its):>6}{100 * sum(its) / len(its):>8.1f} %")
    return passed


def main() -> int:
    """Open, ask, print; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description="Examines a tiny model; exit status 1 when it misses a bar.")
    parser.add_argument("--model", type=Path, default=assemble.TINY, help="folder (default: the model that ships)")
    parser.add_argument("--tuned", type=Path, help="folder of what was finetuned on the new task on top of the model")
    parser.add_argument("--seed", type=int, default=SEED, help="of the exam")
    parser.add_argument("--mistakes", type=int, default=0, help="wrong answers to show")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    args = parser.parse_args()
    started = time.time()
    scenes = exam.scenes(args.seed)
    cases = [*scenes, *exam.handwriting(args.seed), *exam.negatives(args.seed), *exam.others(args.seed)]
    cases += exam.swapped(scenes)[::3]
    ranks = dist.init(tp=1, device="cpu")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    bundle = assemble.open_model([args.model], ranks=ranks, dtype=dtype)
    parities = exam.parities(args.seed) if args.tuned else []
    with Engine(bundle, ranks, rows=ROWS, window=128) as engine:
        answers = ask(engine, cases + parities)
    passed = report(cases, answers[: len(cases)], mistakes=args.mistakes)
    if args.tuned:
        right = sum(answer == case.answer for answer, case in zip(answers[len(cases) :], parities, strict=True))
        print(f"{'even or odd, before':<28}{len(parities):>6}{100 * right / len(parities):>8.1f} %")
        bundle = assemble.open_model([args.model, args.tuned], ranks=ranks, dtype=dtype)
        with Engine(bundle, ranks, rows=ROWS, window=128) as engine:
            passed &= report(parities, ask(engine, parities), mistakes=args.mistakes)
    verdict = "all bars cleared" if passed else "MISSED"
    print(f"{args.model}, seed {args.seed}, {args.dtype}: {verdict}, {time.time() - started:.0f} s")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
