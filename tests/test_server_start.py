"""A server that could not work says so before it loads a model."""

import logging
import re
import socket
from collections.abc import Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from treadle.bundle.base_model import load_model
from treadle.bundle.bundle import Bundle, read_bundle
from treadle.common.errors import OptionError
from treadle.engine.engine import Engine
from treadle.engine.loading import load
from treadle.serving.openai.params import ServeParams
from treadle.serving.openai.serve import serve
from treadle.serving.openai.start import bound, check_start

from conftest import Run


@pytest.fixture(scope="module")
def read(bundle_folder: Path) -> Bundle:
    return read_bundle(bundle_folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"api_key_file": "/nowhere"}, "api_key_file /nowhere cannot be read"),
        ({"tls_cert": "/nowhere", "tls_key": "/nowhere"}, "tls_cert '/nowhere' and tls_key '/nowhere' cannot be used"),
        ({"adapter_dir": "/nowhere"}, "adapter_dir '/nowhere' is not a folder"),
        ({"model_name": "math"}, "model_name 'math' is what requests call an adapter"),
    ],
)
def test_what_cannot_be_used_is_refused(read: Bundle, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        check_start(read, ServeParams(**options))


def test_a_malformed_key_file_and_a_certificate_that_is_none_are_refused_at_once(read: Bundle, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("a b c\n")
    (tmp_path / "cert").write_text("nothing")
    files = {name: str(tmp_path / "cert") for name in ("tls_cert", "tls_key")}
    with pytest.raises(OptionError, match=r"the server cannot start:[\s\S]*line 1: expected KEY[\s\S]*cannot be used"):
        check_start(read, ServeParams(api_key_file=str(tmp_path / "keys"), **files))


@pytest.mark.parametrize("name", ["code", "base"])
def test_a_folder_called_like_another_model_needs_a_name(bundle_folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to(bundle_folder)  # the folder itself is called bundle
    assert check_start(read_bundle(tmp_path / name), ServeParams()).is_open
    import shutil

    shutil.copytree(bundle_folder, tmp_path / "copies" / name)
    with pytest.raises(OptionError, match=f"the folder's '{name}' is what requests call"):
        check_start(read_bundle(tmp_path / "copies" / name), ServeParams())
    check_start(read_bundle(tmp_path / "copies" / name), ServeParams(model_name="mine"))


def test_what_may_not_be_meant_is_warned_of(read: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "treadle.serving.openai")
    (tmp_path / "keys").write_text("few maht,science\n")
    check_start(read, ServeParams(api_key_file=str(tmp_path / "keys")))
    assert "unknown adapter 'maht'. Did you mean 'math'?" in caplog.text
    caplog.clear()
    check_start(read, ServeParams(host="0.0.0.0"))
    assert "listening on 0.0.0.0 without an API key" in caplog.text
    caplog.clear()
    for options in ({"host": "localhost"}, {"host": "0.0.0.0", "api_key": ("k",)}):
        check_start(read, ServeParams(**options))
    assert caplog.text == ""


def test_a_port_in_use_is_refused() -> None:
    with bound("127.0.0.1", 0) as (taken,):
        taken.listen()
        port = taken.getsockname()[1]
        message = rf"cannot listen on 127\.0\.0\.1, port {port}.*in use; give another --port"
        with pytest.raises(OptionError, match=message), bound("127.0.0.1", port):
            pass
    with pytest.raises(OptionError, match="give another --port"), bound("192.0.2.1", 0):  # an address of nobody
        pass


@contextmanager
def another_process_listens(port: int = 0) -> Generator[int]:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", port))
        taken.listen()
        yield taken.getsockname()[1]


def raises_that_the_port_is_taken(port: int) -> AbstractContextManager[object]:
    line = f"cannot listen on 127.0.0.1, port {port}: Address already in use; give another --port (0 = any free)"
    return pytest.raises(OptionError, match=f"^{re.escape(line)} or --host$")


def test_a_port_that_is_taken_ends_the_server_before_the_model_is_loaded(bundle_folder: Path) -> None:
    with another_process_listens() as port, raises_that_the_port_is_taken(port):
        serve(str(bundle_folder), ServeParams(port=port), lambda *_, **__: pytest.fail("the model was loaded"))


def test_a_port_that_another_server_takes_while_the_model_is_loaded_ends_the_server(bundle_folder: Path) -> None:
    with bound("127.0.0.1", 0) as (free,), ExitStack() as stack:
        port = free.getsockname()[1]
        free.close()

        def load_and_lose(bundle: Bundle, **options: Any) -> Engine:
            stack.enter_context(another_process_listens(port))
            return load(bundle, **options)

        with raises_that_the_port_is_taken(port):
            serve(str(bundle_folder), ServeParams(port=port), load_and_lose)


def test_every_address_of_a_host_gets_the_same_port(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
    hosts = ("192.0.2.1", "127.0.0.1", "127.0.0.2")  # the first is none of this machine's
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(*kinds, (host, 0)) for host in hosts])
    with bound("some", 0) as sockets:
        assert [each.getsockname()[0] for each in sockets] == ["127.0.0.1", "127.0.0.2"]
        assert len({each.getsockname()[1] for each in sockets}) == 1


def test_an_unknown_device_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(OptionError, match="device 'cudaa' cannot be used: "):
        load_model("/nowhere", device="cudaa")


@pytest.mark.parametrize("flags", [("--device", "cudaa"), ("--api-key-file", "/nowhere"), ("--dtype", "float99")])
def test_the_command_ends_with_a_message_and_never_says_that_it_serves(
    run: Run, bundle_folder: Path, flags: tuple[str, str]
) -> None:
    code, _, err = run("serve", bundle_folder, "--port", 0, *flags)
    assert code == 1
    assert flags[1] in err
    assert "serving" not in err
    assert "Traceback" not in err
