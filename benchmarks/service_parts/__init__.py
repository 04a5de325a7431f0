"""The parts of `benchmarks.service`, one file per thing that is measured."""
