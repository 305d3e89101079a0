"""tools/demo.py without a browser: its examples, what it refuses, how it starts."""

import socket
from pathlib import Path

import pytest
from helpers import make_trained

from tools import demo
from utils.config import load_config
from utils.errors import UserError
from utils.photos import read_photo
from utils.records import RecordReader


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return make_trained(tmp_path_factory.getbasetemp())


# ----------------------------------------------------------------------------------------- examples


def test_examples_are_of_the_val_split(tmp_path, config):
    found = demo.find_examples(load_config(config), tmp_path / "examples")
    reader = RecordReader(load_config(config).DATA.val_lmdb)
    sentences = {s for i in range(len(reader)) for s in reader.ref(i).sentences}
    assert 2 <= len(found) <= demo.EXAMPLES
    assert {sentence for _, sentence in found} <= sentences
    assert len({Path(path).read_bytes() for path, _ in found}) == len(found)


def test_examples_of_refshapes_are_drawn_where_there_is_no_split(tmp_path, config):
    nowhere = ["DATA.val_lmdb", str(tmp_path / "no.lmdb")]
    opts = [*nowhere, "DATA.dataset", "refshapes"]
    found = demo.find_examples(load_config(config, opts), tmp_path / "examples")
    assert len(found) == demo.EXAMPLES
    assert all(read_photo(path).shape[2] == 3 and sentence for path, sentence in found)
    assert demo.find_examples(load_config(config, nowhere), tmp_path / "none") == []


def test_a_damaged_split_costs_the_examples_only(tmp_path, config):
    (tmp_path / "val.lmdb").write_bytes(b"no database")
    opts = ["DATA.val_lmdb", str(tmp_path / "val.lmdb")]
    assert demo.find_examples(load_config(config, opts), tmp_path / "examples") == []


# ---------------------------------------------------------------------------------------- start


def error_of(*args: object) -> str:
    with pytest.raises(UserError) as caught:
        demo.main([str(arg) for arg in args])
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_without_gradio_the_remedy_is_named(config, monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert "pip install -r requirements-demo.txt" in error_of("--config", config)


def test_a_port_in_use_is_one_line_and_comes_before_the_model(monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = error_of("--config", "no.yaml", "--port", port)
    assert message == f"port {port} of 127.0.0.1 is in use: name another, --port N"


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host", "::2"])
def test_a_host_that_is_not_this_machine_is_one_line(host, monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: True)
    assert f"--host {host}" in error_of("--config", "no.yaml", "--host", host)


@pytest.mark.parametrize("words", [["--port", "65536"], ["--max-upload", "0"]])
def test_numbers_out_of_range_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        demo.main(["--config", "no.yaml", *words])
    assert f"error: {words[0]} {words[1]}: give" in capsys.readouterr().err


def test_this_machine_alone_is_the_default():
    args = demo._parse_args(["--config", "x.yaml"])
    with demo.listen(args.host, 0) as door:
        assert door.getsockname()[0] == "127.0.0.1"
