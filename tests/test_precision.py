"""precision.py decides by planted timings; what it prints, and what autocast then does."""
import pytest
import torch

import checkpoint
import flags
import precision


@pytest.fixture(autouse=True)
def fresh():
    """Nothing is remembered from another test, or for one."""
    precision.resolve.cache_clear()
    yield
    precision.resolve.cache_clear()


def plant(monkeypatch, half, single=0.001):
    """A bfloat16 product takes `half` seconds, a float32 one `single`."""
    monkeypatch.setattr(precision, "product_seconds", lambda: (single, half))


@pytest.mark.parametrize("half, expected", [
    (0.0002, "bfloat16"), (0.00079, "bfloat16"), (0.00081, "float32"), (0.1, "float32")])
def test_auto_on_a_cpu_is_what_is_faster(monkeypatch, capsys, half, expected):
    plant(monkeypatch, half)
    assert precision.resolve("cpu") == precision.resolve("cpu", "auto") == expected
    assert capsys.readouterr() == ("", "")                          # nothing to warn of


def test_bfloat16_on_a_slow_cpu_is_one_line_with_the_factor(monkeypatch, capsys):
    plant(monkeypatch, 0.037)
    assert precision.resolve("cpu", "bfloat16") == "bfloat16"
    for _ in range(3):                                  # a run resolves it in many places
        with precision.autocast("cpu", "bfloat16"):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert "37 times slower" in err and "--precision float32" in err


def test_bfloat16_on_a_fast_cpu_and_float32_are_silent(monkeypatch, capsys):
    plant(monkeypatch, 0.0005)
    assert [precision.resolve("cpu", name) for name in ("bfloat16", "float32")] == [
        "bfloat16", "float32"]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name, words", [("float64", "one of auto, float32, bfloat16, float16"),
                                         ("float16", "float16 is for GPUs; use float32")])
def test_what_a_cpu_cannot_do_is_one_line(name, words):
    with pytest.raises(ValueError, match=words) as error:
        precision.resolve("cpu", name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("supported, expected", [(True, "bfloat16"), (False, "float16")])
def test_auto_on_a_gpu(monkeypatch, supported, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: supported)
    assert precision.resolve("cuda:0") == expected
    precision.resolve.cache_clear()
    assert precision.resolve("cuda:0", "float32") == "float32"


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_autocast_computes_in_the_precision(monkeypatch, name):
    plant(monkeypatch, 0.001)
    with precision.autocast("cpu", name):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == getattr(torch, name)


def test_products_are_timed_on_one_thread_which_is_given_back():
    precision.product_seconds.cache_clear()
    torch.set_num_threads(2)
    try:
        single, half = precision.product_seconds()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    # two million multiply-adds: between a thousandth and a thousand GFLOP/s, on any machine
    assert 4e-6 < single < 4 and 4e-6 < half < 4
    assert precision.bfloat16_slowdown() == half / single


def test_train_resolves_auto_before_it_stores_it(monkeypatch):
    plant(monkeypatch, 0.1)
    args = flags.parse(["--device", "cpu"])
    flags.check(args)
    assert args.precision == checkpoint.config_of(args)["precision"] == "float32"
