"""Lines a test wants to see at the end of the terminal report: it appends them to the fixture `notes`. Over several
processes (pytest-xdist, `--dist loadfile`) a file stays in one of them: its fixtures are costly to make twice."""
import pytest
import torch

# files whose tests share little
SPREAD = {"test_notebooks.py", "test_published.py", "test_convergence.py", "test_refused.py", "test_belongs.py"}


def pytest_configure(config): config.stash_notes = []

@pytest.fixture(autouse=True)
def seeded():
    "Random networks of a test are the same in every run, whatever ran before it."
    torch.manual_seed(0)

@pytest.fixture(scope="session")
def notes(request) -> list[str]:
    "Lines for the end of the terminal report"
    return request.config.stash_notes

@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    if config.getvalue("dist") != "loadfile": return None
    from xdist.scheduler import LoadFileScheduling
    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return nodeid if file.rpartition("/")[2] in SPREAD else file
    return Files(config, log)

def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"): session.config.workeroutput["notes"] = session.config.stash_notes

@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    node.config.stash_notes += getattr(node, "workeroutput", {}).get("notes", [])

def pytest_terminal_summary(terminalreporter, config):
    if config.stash_notes: terminalreporter.section("measured")
    for line in config.stash_notes: terminalreporter.write_line(line)
