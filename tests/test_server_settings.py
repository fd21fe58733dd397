"""Where the server's options come from, and who its keys let in."""

import json
from pathlib import Path

import pytest
import yaml

from treadle.common.errors import OptionError
from treadle.serving.openai.keys import Caller, Keyring, read_keys
from treadle.serving.openai.params import ServeParams, print_settings, read_file, read_settings

from conftest import Run


def test_command_line_over_environment_over_file_over_default(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("port: 1\nmax-queue: 2\nmax_batch: 3\napi_key: [a, b]\ncors-origin: http://x\n")
    environment = {"TREADLE_PORT": "11", "TREADLE_MAX_QUEUE": "12", "TREADLE_HOME": "elsewhere", "PORT": "99"}
    params, origins = read_settings({"port": "21"}, environment, file)
    assert (params.port, params.max_queue, params.max_batch, params.max_n) == (21, 12, 3, 16)
    assert (params.api_key, params.cors_origin) == (("a", "b"), ("http://x",))
    assert [origins[name] for name in ("port", "max_queue", "max_batch", "max_n")] == [
        "command line",
        "environment",
        f"file {file}",
        "default",
    ]
    assert read_settings({}, {"TREADLE_CONFIG": str(file)}, None)[0].port == 1
    assert read_settings({}, {"TREADLE_API_KEY": "x,y"}, None)[0].api_key == ("x", "y")
    assert read_settings({}, {"TREADLE_LOG_PROMPTS": "true", "TREADLE_PORT": ""}, None)[0] == ServeParams(
        log_prompts=True
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 1\nmax_qeue: 2", r"unknown key 'prot'\. Did you mean 'port'\?[\s\S]*Did you mean 'max_queue'"),
        ("port: often", "port must be a whole number from 0 to 65535, not 'often'"),
        ("port: 70000", "port must be a whole number from 0 to 65535, not 70000"),
        ("port: [", "cannot be read"),
        ("- port", "holds no keys"),
        ("model_name: base", "'base' is what requests call the base model"),
        ("log_format: xml", "unknown log_format 'xml'"),
        ("max_batch: 0\nread_timeout: 0", r"max_batch must be a whole number of at least 1, not 0[\s\S]*read_timeout"),
        ("tls_cert: x", "tls_cert and tls_key go together"),
        ("api_key: ['a b']", "holds spaces"),
        ("api_key: [a]\nadmin_key: a", "given twice"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "serve.yaml").write_text(text)
    with pytest.raises(OptionError, match=message):
        read_settings({}, {}, tmp_path / "serve.yaml")


def test_a_missing_file_and_a_bad_variable_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot be read"):
        read_settings({}, {}, tmp_path / "none.yaml")
    with pytest.raises(OptionError, match="port must be a whole number from 0 to 65535, not 'x'"):
        read_settings({}, {"TREADLE_PORT": "x"}, None)


def test_what_is_printed_can_be_read_back_and_shows_no_key(tmp_path: Path) -> None:
    params, origins = read_settings({"port": "5", "api_key": ["s3cret"], "cors_origin": ["http://x"]}, {}, None)
    text = print_settings(params, origins)
    assert "s3cret" not in text
    assert "port: 5  # command line; port to listen on" in text
    (tmp_path / "printed.yaml").write_text(text)
    assert read_settings({"api_key": ["s3cret"]}, {}, tmp_path / "printed.yaml")[0] == params
    assert set(yaml.safe_load(text)) == set(vars(params)) - {"api_key"}


def test_the_command_prints_its_settings(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TREADLE_MAX_BATCH", "7")
    code, out, _ = run("serve", "nowhere", "--print-config", "--port", 123, "--log-prompts")
    assert code == 0
    assert "max_batch: 7  # environment" in out
    assert "port: 123  # command line" in out
    assert "log_prompts: true  # command line" in out
    code, _, err = run("serve", "nowhere", "--port", "x")
    assert (code, err.count("\n")) == (1, 2)
    assert "port must be a whole number from 0 to 65535, not 'x'" in err
    code, _, err = run("serve", tmp_path)
    assert code == 1
    assert "is not a bundle" in err


def test_the_keys_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# team\nall-1\nfew-2 math,code\n\nnone-3 ,\n")
    assert read_keys(file) == [
        ("all-1", None),
        ("few-2", frozenset({"math", "code"})),
        ("none-3", frozenset()),
    ]
    ring = Keyring(ServeParams(api_key=("flag-4",), api_key_file=str(file), admin_key="root-5"))
    callers = {key: ring.caller(f"Bearer {key}") for key in ("all-1", "few-2", "flag-4", "root-5")}
    assert all(callers.values())
    assert callers["few-2"].adapters == {"math", "code"}
    assert [caller.is_admin for caller in callers.values()] == [False, False, False, True]
    assert len({caller.id for caller in callers.values()}) == 4
    assert not any(key[:4] in caller.id for key, caller in callers.items())
    for wrong in (None, "", "all-1", "Bearer", "Bearer all-", "Bearer all-12", "Basic all-1", "Bearer all-1 x"):
        assert ring.caller(wrong) is None
    file.write_text("a b c\nd\nd\n")
    with pytest.raises(OptionError, match=r"line 1: expected KEY[\s\S]*line 3: the key is given twice"):
        read_keys(file)


def test_a_comment_may_follow_a_key(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one #team\ntwo math # team\nth#ree\n  # nothing\n")
    assert read_keys(file) == [("one", None), ("two", frozenset({"math"})), ("th#ree", None)]


def test_a_key_is_given_in_one_place(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("fine\nboth math\nroot\n")
    with pytest.raises(OptionError, match=r"line 2: .* by --api-key too[\s\S]*line 3: .* by --admin-key too"):
        Keyring(ServeParams(api_key=("both",), api_key_file=str(file), admin_key="root"))


def test_a_server_without_keys_is_open_to_all_but_admins() -> None:
    ring = Keyring(ServeParams(admin_key="root"))
    assert ring.caller(None) == ring.caller("Bearer x") == Caller()
    assert ring.caller("Bearer root") is not None
    assert ring.caller("Bearer root").is_admin


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    compared: list[tuple[bytes, bytes]] = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    ring = Keyring(ServeParams(api_key=("one", "two", "three")))
    assert ring.caller("Bearer one")
    assert len(compared) == 3
    assert {len(each) for pair in compared for each in pair} == {32}


def test_options_and_the_command_line_load_no_web_library() -> None:
    import subprocess
    import sys

    code = "import sys, treadle.cli.main; print(json.dumps([*sys.modules]))".replace(
        "import sys", "import sys, json", 1
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"starlette", "uvicorn", "pydantic", "prometheus_client", "yaml", "torch"} & set(json.loads(done.stdout))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("api_key: " + "[" * 100_000, "it has more than 256 lists and objects"),
        ("host: &a x\napi_key: *a", r"an alias \(\*name\) is not read"),
        ("port: 2001-99-99", "month must be in"),
        ("a: " * 5 + "!!python/object/apply:os.getcwd []", "cannot be read"),
        ("- " * 3000, "nested"),
    ],
    ids=["nest", "alias", "no date", "object", "block nest"],
)
def test_a_hostile_file_is_refused_at_once(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(text)
    with pytest.raises(OptionError, match=message):
        read_file(file)
