from benchmarks.report import conditions


def pytest_benchmark_update_machine_info(config, machine_info):
    """The conditions of `benchmarks.report` instead of the machine's name and kernel."""
    machine_info.clear()
    machine_info.update(conditions())


def pytest_benchmark_update_commit_info(config, commit_info):
    """The commit without the folder's name."""
    commit_info.pop("project", None)
