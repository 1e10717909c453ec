import pytest

from harness import oracles
from harness.plan import parse_oracles
from reference.errors import RequestError
from reference.pins import OracleSpec, find_pin, read_pins

HASH = "0" * 64


def test_the_projects_pins():
    pins = read_pins()
    assert {"ultralytics==8.4.190", "ultralytics==8.1.47", "yolox==0.3.0", "transformers==5.23.0"} <= set(pins)
    assert all(str(pin) == key for key, pin in pins.items())
    assert find_pin("yolox==0.3.0").archive == "yolox-0.3.0.tar.gz"


def test_a_negative_control_says_what_is_wrong_with_it():
    controls = {key: pin.control for key, pin in read_pins().items() if pin.control}
    assert controls == {"ultralytics==8.0.100": "N by N broadcast in the box loss"}
    assert find_pin("ultralytics==8.0.100").archive == "ultralytics-8.0.100-py3-none-any.whl"


def test_pins_of_eras_are_for_the_matrix_alone():
    eras = {key for key, pin in read_pins().items() if pin.matrix}
    assert eras == {f"ultralytics=={version}" for version in ("8.4.127", "8.3.253", "8.0.0")} | {"transformers==4.57.6"}
    assert not eras & set(oracles.pins())
    assert parse_oracles("ultralytics==8.0.0", []) == ("ultralytics==8.0.0",)


@pytest.mark.parametrize("text", ["ultralytics==8.4.190", "transformers=installed"])
def test_a_spec_is_written_as_it_is_read(text):
    assert str(OracleSpec.parse(text)) == text


def test_a_folder_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = OracleSpec.parse("yolox=.")
    assert spec == OracleSpec("yolox", folder=str(tmp_path))
    assert OracleSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "complaints"),
    [
        ("", ["no package ''", "ultralytics, yolox, transformers", "NAME==VERSION"]),
        ("mmdet==3.0", ["no package 'mmdet'", "ultralytics, yolox, transformers"]),
        ("yolox", ["names no version", "NAME=FOLDER", "yolox==0.3.0"]),
        ("yolox=", ["names no version"]),
        ("yolox==", ["names no version"]),
        ("yolox==0.1", ["'yolox==0.1' is not pinned", "ultralytics==8.4.190", "yolox==0.3.0"]),
        ("yolox=0.3.0", ["is not a folder", "yolox==VERSION"]),
    ],
)
def test_a_wrong_spec_is_explained(text, complaints):
    with pytest.raises(RequestError) as caught:
        OracleSpec.parse(text)
    assert caught.value.exit_code == 4
    assert repr(text) in str(caught.value)
    for complaint in complaints:
        assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("[oracles", "no table of"),
        ("", "no table of"),
        (f'[oracles]\na = {{ archive = "a.whl", sha256 = "{HASH}" }}', "'a' is not NAME==VERSION"),
        ('[oracles]\n"a==1" = "a.whl"', "a==1 must have exactly"),
        (f'[oracles]\n"a==1" = {{ archive = "a.whl", sha256 = "{HASH}", kind = 1 }}', "must have exactly"),
        (f'[oracles]\n"a==1" = {{ archive = "a.whl", sha256 = "{HASH}", control = "" }}', "must say what is wrong"),
        (f'[oracles]\n"a==1" = {{ archive = "a.whl", sha256 = "{HASH}", matrix = false }}', "must be true, or absent"),
        (f'[oracles]\n"a==1" = {{ archive = "a.whl", sha256 = "{HASH}", matrix = "yes" }}', "must be true, or absent"),
        (f'[oracles]\n"a==1" = {{ archive = "a.zip", sha256 = "{HASH}" }}', "archive 'a.zip' is not"),
        (f'[oracles]\n"a==1" = {{ archive = "../a.whl", sha256 = "{HASH}" }}', "archive '../a.whl' is not"),
        ('[oracles]\n"a==1" = { archive = "a.whl", sha256 = "ABC" }', "sha256 'ABC' is not 64"),
    ],
)
def test_a_malformed_pin_is_named(tmp_path, content, complaint):
    file = tmp_path / "pins.toml"
    file.write_text(content)
    with pytest.raises(RequestError, match=r"^pins\.toml: ") as caught:
        read_pins(file)
    assert complaint in str(caught.value)
