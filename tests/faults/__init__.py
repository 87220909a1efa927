import pytest

pytest.register_assert_rewrite("faults.processes", "faults.trials")
