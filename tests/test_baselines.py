"""extras/baselines.py: residual k-means and beam search on data whose answer is known, the CLS in a
student's space, and the file that a call writes."""
import functools
import json
import math

import pytest
import torch

import checkpoint
import data
import evaluate
import flags
import teachers
from extras import baselines
from extras.baselines import decode, extend, residual_kmeans


def encode(x, codebooks, beam):
    """x (n, d) -> the best codes (n, T) that `extend` finds."""
    residuals, codes = x[:, None], torch.empty(len(x), 1, 0, dtype=torch.long)
    for centroids in codebooks:
        residuals, codes = extend(residuals, codes, centroids, beam)
    return codes[:, 0]


def test_two_stages_find_a_sum_of_two_codebooks():
    """Points are coarse (4 far corners) + fine (a small offset in a third dimension): 4 + 4
    centroids are exact."""
    corners = torch.tensor([[100.0, 0, 0], [0, 100, 0], [-100, 0, 0], [0, -100, 0]])
    offsets = torch.tensor([1.0, -1]).repeat(100)[:, None]
    x = corners.repeat_interleave(50, 0) + torch.tensor([0.0, 0, 1]) * offsets
    best = None
    for seed in range(20):                              # Lloyd from random rows may miss a corner
        torch.manual_seed(seed)
        _, (train_x, test_x, ids) = residual_kmeans(x, x[:3], 4, 2)
        if best is None or (x - train_x).norm() < (x - best[0]).norm():
            best = train_x, test_x, ids
    train_x, test_x, ids = best
    assert torch.allclose(train_x, x, atol=0.05) and torch.allclose(test_x, x[:3], atol=0.05)
    # the first three images share a corner, and the offset alternates
    assert ids.shape == (3, 2) and len(set(ids[:, 0].tolist())) == 1
    assert ids[0, 1] == ids[2, 1] != ids[1, 1]


@pytest.mark.parametrize("beam", [1, 4])
def test_each_stage_lowers_the_error_and_test_is_not_fitted(beam):
    train_x, other = torch.randn(300, 8), torch.randn(300, 8) + 5
    runs = []
    for test_x in (other, other * 0):
        torch.manual_seed(0)
        runs.append([a for a, *_ in residual_kmeans(train_x, test_x, 8, 4, beam)])
    errors = [(train_x - a).square().mean().item() for a in runs[0]]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.7 * errors[0]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_the_first_stage_is_k_means():
    """Two far clusters: their centroids are the means."""
    x = torch.cat([torch.randn(50, 3), torch.randn(50, 3) + 40])
    (reconstructed, _, ids), = residual_kmeans(x, x, 2, 1)
    means = torch.stack([x[:50].mean(0), x[50:].mean(0)]).repeat_interleave(50, 0)
    assert torch.allclose(reconstructed, means, atol=1e-4)
    assert len(ids[:50].unique()) == len(ids[50:].unique()) == 1 and ids[0] != ids[50]


def test_beam_search_finds_the_code_that_greedy_search_misses():
    """x = 4 is nearest to centroid 0 of {0, 10}, but 10 - 6 is 4 and 0 + 0 is not. -1 = 0 - 1."""
    codebooks = [torch.tensor([[0.0], [10.0]]), torch.tensor([[0.0], [-6.0], [-1.0]])]
    x = torch.tensor([[4.0], [-1.0]])
    assert encode(x, codebooks, 1).tolist() == [[0, 0], [0, 2]]             # off by 4 and by 0
    assert encode(x, codebooks, 2).tolist() == [[1, 1], [0, 2]]
    assert decode(encode(x, codebooks, 2), codebooks).tolist() == [[4], [-1]]


def test_a_wide_beam_is_exhaustive_search_and_a_narrow_one_lies_between():
    codebooks, x = [torch.randn(5, 6) * 0.7**t for t in range(3)], torch.randn(200, 6)
    every = torch.cartesian_prod(*[torch.arange(5)] * 3)                    # all 125 codes
    distance = torch.cdist(x, decode(every, codebooks))

    def error(beam):
        return (x - decode(encode(x, codebooks, beam), codebooks)).norm(dim=1)
    assert torch.allclose(error(25), distance.min(1).values, atol=1e-4)
    greedy, narrow, wide = (error(beam).square().mean() for beam in (1, 3, 25))
    assert wide < narrow < 0.95 * greedy


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """A checkpoint of an untrained student whose space is turned, and images with classes."""
    torch.save(teachers.small_vit(8, 4, 64, 1, 1).vit.state_dict(), tmp_path / "teacher.pt")
    words = ["--teacher", str(tmp_path / "teacher.pt"), "--image-size", "8", "--vocab", "4",
             "--length", "4", "--prototypes", "8", "--device", "cpu", "--seed", "3",
             "--train-images", "80", "--test-images", "40", "--precision", "float32"]
    args = flags.parse([*words, "--out", str(tmp_path)])
    student = checkpoint.STUDENTS[args.recipe](args, 64)
    student.whiten.copy_(torch.randn(64, 64))
    vit = torch.load(tmp_path / "teacher.pt", weights_only=True)
    checkpoint.save(tmp_path / "ckpt.pt", {"config": checkpoint.config_of(args), "teacher": vit,
                                           "student": student.state_dict()})

    def load(name, split, size, limit, seed, storage="auto"):
        assert (name, size, seed) == ("shapes", 8, 3)
        labels = torch.arange(limit) % 4                # brightness gives the class
        noise = torch.randint(40, (limit, 3, 8, 8))
        images = (60 * labels[:, None, None, None] + noise).to(torch.uint8)
        return data.ImageSet(images, labels, list("abcd"))
    monkeypatch.setattr(evaluate, "load", load)
    probe = functools.partial(evaluate.linear_probe, grid=(0.1,), iterations=3)     # fast
    monkeypatch.setattr(evaluate, "linear_probe", probe)
    return tmp_path


@pytest.mark.parametrize("beam", ["1", "8"])
def test_the_file_has_every_prefix_in_the_students_space(run_dir, beam):
    flags = ["--checkpoint", str(run_dir / "ckpt.pt"), "--device", "cpu", "--beam", beam]
    args = baselines.parse([*flags, "--json", str(run_dir / "x.json")])
    assert (args.vocab, args.length, args.seed, args.train_images) == (4, 4, 3, 80)     # the run's
    baselines.run(args)
    rows = json.loads((run_dir / "x.json").read_text())
    assert list(rows) == ["config", "hardware", "seconds", "teacher", "teacher_space",
                          "1", "2", "4"]
    for name in list(rows)[3:]:
        top1 = rows[name]["knn_top1"]
        for ratio, reference in (("raw", "teacher"), ("space", "teacher_space")):
            expected = top1 / rows[reference]["knn_top1"]
            assert rows[name][f"retention_{ratio}"] == pytest.approx(expected)
        assert 0 < top1 <= 100 and 0 <= rows[name]["linear_top1"] <= 100
    assert len(rows["4"]["perplexity"]) == 4 and 1 <= min(rows["4"]["perplexity"]) <= 4
    assert rows["config"]["beam"] == int(beam) and rows["hardware"]["threads"] == 1

    _, teacher, student = checkpoint.load_model(run_dir / "ckpt.pt")
    sets = evaluate.load_splits(vars(args))
    x = data.normalize(sets[1].get(torch.arange(40)), 8)
    space = baselines.cls_features(args, sets)["teacher_space"][1]
    expected = torch.nn.functional.normalize(teacher(x)[:, 0] @ student.whiten, dim=1) * 8
    assert torch.allclose(space, expected, atol=1e-4) and not math.isclose(space.std(), 0)


@torch.no_grad()
def test_learned_codebooks_are_searched_and_interpreted(run_dir):
    """A beam of all 16 codes of two symbols finds the nearest sum; its feature is the student's z_s
    of these symbols, whatever follows them."""
    args = baselines.parse(["--checkpoint", str(run_dir / "ckpt.pt"), "--device", "cpu",
                            "--learned", "--beam", "16", "--json", str(run_dir / "x.json")])
    _, _, student = checkpoint.load_model(args.checkpoint)
    train, test = torch.randn(2000, 64), torch.randn(1100, 64)      # more than one chunk
    found = [*baselines.learned_codes(student, train, test, 16)]
    assert [z is None for z, _, _ in found] == [False, False, True, False]
    _, z, codes = found[1]
    every = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    sums = decode(every, [disc.codebook for disc in student.disc])
    assert torch.equal(codes, every[torch.cdist(test, sums).argmin(1)])
    after = torch.randint(4, (1100, 2))
    expected = student.interpret(student.embed(torch.cat([codes, after], 1)))[:, 1]
    assert torch.allclose(z, expected, atol=1e-4)
    assert len(z.unique(dim=0)) == len(codes.unique(dim=0))

    baselines.run(args)
    rows = json.loads((run_dir / "x.json").read_text())
    assert list(rows)[3:] == ["teacher", "teacher_space", "1", "2", "4"]
    assert rows["config"]["disc"] == "softmax" and rows["config"]["learned"] is True


@pytest.mark.parametrize("change", [["--recipe", "paper"], ["--attention", "own", "--disc", "vq"]])
def test_learned_needs_a_codebook_for_each_position(run_dir, change):
    args = flags.parse(["--teacher", str(run_dir / "teacher.pt"), "--image-size", "8", "--vocab",
                        "4", "--length", "4", "--prototypes", "8", *change])
    student = checkpoint.STUDENTS[args.recipe](args, 64)
    state = checkpoint.load(run_dir / "ckpt.pt")
    checkpoint.save(run_dir / "ckpt.pt", state | {"config": checkpoint.config_of(args),
                                                  "student": student.state_dict()})
    args = baselines.parse(["--checkpoint", str(run_dir / "ckpt.pt"), "--device", "cpu"])
    with pytest.raises(ValueError, match="recipe stable with --attention free"):
        baselines.load_searchable(args)


def test_without_a_checkpoint_it_is_the_raw_cls(run_dir):
    flags = ["--teacher", str(run_dir / "teacher.pt"), "--image-size", "8", "--vocab", "4",
             "--length", "2", "--seed", "3", "--train-images", "80", "--test-images", "40"]
    baselines.run(baselines.parse([*flags, "--device", "cpu", "--json", str(run_dir / "x.json")]))
    rows = json.loads((run_dir / "x.json").read_text())
    assert list(rows)[3:] == ["teacher", "1", "2"] and "retention_space" not in rows["1"]
    assert rows["1"]["knn_top1"] > 60                   # four kinds of images, four centroids


@pytest.mark.parametrize("flags, words", [
    (["--json", "no/such/x.json"], "does not exist; make it first"),
    (["--beam", "0"], "must be at least 1"), (["--checkpoint", "no.pt"], "no file no.pt"),
    (["--learned"], "--learned needs --checkpoint")])
def test_what_cannot_be_is_one_line_before_anything_is_computed(monkeypatch, flags, words):
    monkeypatch.setattr("sys.argv", ["baselines", *flags])
    monkeypatch.setattr(evaluate, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(SystemExit, match=words):
        baselines.main()
