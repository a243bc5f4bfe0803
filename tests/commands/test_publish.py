"""The commands around a submission: printed with the data, the root and the trust that they need."""

import pytest

from at_extensions.commands.publish import verify_command
from at_extensions.runs import RunDirectory


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"data": {"name": "npz:/home/me/scans.npz"}}, "--data npz:/home/me/scans.npz"),
        ({"data": {"name": "cifar10", "root": "/data"}}, "--root /data"),
        ({"data": {"name": "digits", "root": None}, "model": {"factory": "nets:Net"}}, "--trust-code=true"),
        ({"data": {"name": "digits"}}, ""),
    ],
)
def test_the_command_that_verifies_knows_the_run(tmp_path, config, words):
    RunDirectory(tmp_path / "run").write_config(config)
    found = verify_command("a folder", tmp_path / "run").replace(" true", "=true")
    assert found == f"at-extensions verify 'a folder' {words}".strip()
