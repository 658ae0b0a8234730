"""Lines a test wants to see at the end of the terminal report: it appends them to the fixture `notes`."""
import pytest


def pytest_configure(config): config.stash_notes = []

@pytest.fixture(scope="session")
def notes(request) -> list[str]:
    "Lines for the end of the terminal report"
    return request.config.stash_notes

def pytest_terminal_summary(terminalreporter, config):
    if config.stash_notes: terminalreporter.section("measured")
    for line in config.stash_notes: terminalreporter.write_line(line)
