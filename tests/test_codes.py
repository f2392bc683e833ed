"""extras/codes.py: code statistics of planted codes, by hand, and files with bad lines."""
import json
import math

import pytest
import tiny_checkpoint
import torch

from extras import codes, describe


def write(path, *rows):
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def test_statistics_by_hand():
    """Position 1 is the label, position 2 a coin, position 3 constant; half of the rows are
    copies."""
    ids = torch.tensor([[0, 0, 5], [0, 1, 5], [1, 0, 5], [1, 1, 5]]).repeat(2, 1)
    f = codes.code_statistics(ids)
    assert (f["images"], f["length"], f["vocab"]) == (8, 3, 6)
    assert (f["used_symbols"], f["codebook_usage"]) == (3, 0.5)
    assert f["perplexity"] == pytest.approx([2, 2, 1])
    assert (f["unique_codes"], f["duplicates"], f["most_frequent_code"]) == (0.5, 4, 2)
    assert f["bits"] == pytest.approx(3 * math.log2(6)) and f["entropy_bits"] == pytest.approx(2)
    assert codes.code_statistics(ids, vocab=8)["bits"] == 9
    labels = codes.label_statistics(ids, ["cat", "cat", "dog", "dog"] * 2)
    assert labels["information"] == pytest.approx([1, 0, 0], abs=1e-12)
    assert labels["label_entropy"] == 1


def test_information_of_a_noisy_position():
    """p(s = y) = 3/4: I = 1 - H(1/4) = 1 - 0.811278 bits."""
    ids = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0])[:, None]
    f = codes.label_statistics(ids, [0] * 4 + [1] * 4)
    assert f["information"] == pytest.approx([0.188722], abs=1e-6)


def test_knn_of_codes_with_and_without_the_label():
    y = torch.arange(400) % 4
    f = codes.label_statistics(torch.stack([y, y + 2**40], 1), y.tolist())  # large ids cost nothing
    assert set(f["knn"].values()) == {100.0} and f["gallery"] == f["queries"] == 200
    assert f["information_shuffled"][0] < 0.1 < 1.99 < f["information"][0]
    constant = codes.label_statistics(torch.zeros(400, 2).long(), y.tolist())
    assert constant["knn"][200] <= constant["largest_class"] < 40


def test_only_a_part_is_compared_when_one_hot_is_too_large(monkeypatch):
    monkeypatch.setattr(codes, "ONE_HOT", 10 * 2 * 4)
    f = codes.label_statistics(torch.arange(100).view(-1, 1).repeat(1, 2) % 4, [0] * 100)
    assert (f["gallery"], f["queries"]) == (5, 5)


def test_the_command_prints_the_statistics_of_a_file(tmp_path, capsys):
    rows = [{"symbols": [i % 2, 3], "path": f"any/{'ab'[i % 2]}/{i}.jpg", "more": 1}
            for i in range(40)]
    path = write(tmp_path / "codes.jsonl", *rows)
    describe.main(["--statistics", path])
    out = capsys.readouterr().out
    assert "40 images of 2 symbols; vocabulary 4, in use 3 (75.0%)" in out
    assert ("unique codes / images 0.0500: 38 duplicates; the most frequent code occurs 20 times"
            in out)
    assert "bits per image 4.00 (T log2 K); sum of the positions' entropies 1.00" in out
    assert "perplexity per position        2.00    1.00" in out and "label" not in out
    describe.main(["--statistics", path, "--labels-from-path", "--vocab", "16"])
    out = capsys.readouterr().out
    assert "bits per image 8.00" in out and "0.000  of 1.000 (2 classes)" in out
    assert "k = 10: 100.00" in out and "(20 images are the gallery, 20 the queries)" in out


def test_the_vocabulary_can_come_from_a_checkpoint(tmp_path, capsys):
    path = write(tmp_path / "c.jsonl", *({"symbols": [i], "label": "xy"[i]} for i in (0, 1, 0, 1)))
    describe.main([tiny_checkpoint.save(tmp_path / "ckpt.pt"), "--statistics", path])
    out = capsys.readouterr().out
    assert "vocabulary 8, in use 2" in out and "  1.000  of 1.000 (2 classes)" in out


@pytest.mark.parametrize("bad, message", [
    ("{not json", "line 2 is not JSON"), ("", "line 2 is not JSON"), ("[1, 2]", "line 2 needs"),
    ("[" * 100000, "line 2 is not JSON"), ('{"symbols": []}', "line 2 needs"),
    ('{"symbols": "12"}', "line 2 needs"), ('{"symbols": [1, true]}', "line 2 needs"),
    ('{"symbols": [1, 0.5]}', "line 2 needs"), ('{"symbols": [1, -2]}', "line 2: symbols must be"),
    ('{"symbols": [1, 99999999999999999999]}', "line 2: symbols must be"),
    ('{"symbols": [1, 2, 3]}', "line 2 has 3 symbols, the lines before it 2"),
    ('{"symbols": [1, 2], "label": 3}', 'line 2: a "label"')])
def test_a_bad_line_is_named_by_its_number(tmp_path, bad, message):
    path = write(tmp_path / "codes.jsonl", {"symbols": [1, 2]}, bad)
    with pytest.raises(ValueError, match=message):
        codes.read_codes(path)


def test_a_torn_last_line_is_left_out_on_demand(tmp_path):
    path = tmp_path / "codes.jsonl"
    path.write_text('{"symbols": [1, 2]}\n{"symbols": [1')
    assert [row["symbols"] for _, row in codes.read_lines(path, torn=True)] == [[1, 2]]
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        list(codes.read_lines(path))
