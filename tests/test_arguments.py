"""Numbers on the command line that no machine and no library below can take are refused before anything starts."""

import pytest

from overtok_megatron.cli import main


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("prepare", "x.txt", "--tokenizer", "bytes", "--output", "x", "--workers", "99999"),
            "--workers: 99999 is more",
        ),
        (("train-tokenizer", "x.txt", "--output", "x", "--vocab-size", str(10**21)), "2147483647 is the most"),
        (("train", "x.yaml", "--master-port", "99999"), "--master-port: 99999 is not a port"),
        (("serve", "x", "--port", "65536"), "--port: 65536 is not a port"),
        (("serve", "x", "--timeout", "0"), "--timeout: 0 is not a positive number"),
    ],
)
def test_numbers_out_of_all_bounds(arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
