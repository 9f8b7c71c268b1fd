from benchmarks.report import conditions


def pytest_benchmark_update_machine_info(config, machine_info):
    """What `benchmarks.report` says of a machine instead of its name and kernel."""
    machine_info.clear()
    machine_info.update(conditions())


def pytest_benchmark_update_commit_info(config, commit_info):
    """The commit, without the folder's name."""
    commit_info.pop("project", None)
