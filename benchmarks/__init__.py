"""How fast jobfetcher is, each number against its floor or peer in the same run. `make bench`, `python -m benchmarks`.

    python -m benchmarks --list               what there is
    python -m benchmarks --only P3 --only P5  some of it; their rows replace those in build/bench.json
    python -m benchmarks --short              tiny sizes, once: only whether everything runs, never whether a bar holds

Results are rows (`frame.Row`) in build/bench.json, written after every benchmark, and a table. Exit code: 1 when a bar
is missed or a benchmark failed (in CI also when it cannot run: elsewhere it is left out, with a line that says why).

To add a benchmark: write `def name(bench: Bench) -> Iterator[Row]` in a module of this package that says in its
docstring what is measured and against what; yield each row as soon as it is known; name it in `frame.CATALOGUE`. Rules:

- The peer is measured in the same run, in turns (`frame.in_turns`), `bench.repeats` times; rows hold medians.
- Sizes come from `bench.short`; a short run of one benchmark takes seconds.
- Files go below `bench.memory` (a directory in memory, gone afterwards: nothing there depends on a disk) or
  `bench.disk` (the same on the checkout's disk, for what is too large or must be a disk). Both sides use the same one.
- Processes are ended by the block that started them (`tests.support.services.running`), also after Ctrl-C.
- What is missing on this machine is told by `tests.support.services.require`. Progress goes to `bench.say`.

    frame.py      rows, catalogue, runner    jobs.py       P1, P2, P6
    servers.py    nginx, certificates, curl  idle.py       P7, P10
    link.py       a slow link, as a proxy    flat.py       P11
    transfers.py  P3, P4, P5, P13            backoff.py    P12
    memory.py     P8, P9
"""
