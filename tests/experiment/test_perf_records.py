"""What runs must have in common to be compared."""

from __future__ import annotations

from truestep.experiment.perf_records import cohort_values


def test_a_cohort_knows_the_machine_but_not_the_version_under_test() -> None:
    environment = {
        "device.name": "a CPU",
        "library.torch": "2.13",
        "library.truestep": "0.1.0",
        "variable.OMP_NUM_THREADS": "1",
        "model.weights": "abc",
        "attention.kernel": "flash-cpu",
    }
    values = cohort_values(environment, cores=2, dtype="float32")
    assert set(values) == {
        "device.name",
        "library.torch",
        "attention.kernel",
        "machine.cores",
        "case.dtype",
    }
