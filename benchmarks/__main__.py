"""Runs every benchmark in turn: `make bench`. Each prints its figures; none asserts one."""

from benchmarks import loop, measures, plan, store

for benchmark in (plan, loop, measures, store):
    print(f"\n{benchmark.__doc__.splitlines()[0]}")
    benchmark.main()
