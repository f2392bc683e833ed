"""extras/baselines.py: residual k-means on data whose answer is known."""
import torch

from extras.baselines import residual_kmeans


def test_two_stages_find_a_sum_of_two_codebooks():
    """Points are coarse (4 far corners) + fine (a small offset in a third dimension): 4 + 4 centres are exact."""
    corners = torch.tensor([[100.0, 0, 0], [0, 100, 0], [-100, 0, 0], [0, -100, 0]])
    x = corners.repeat_interleave(50, 0) + torch.tensor([0.0, 0, 1]) * torch.tensor([1.0, -1]).repeat(100)[:, None]
    best = None
    for seed in range(20):                                       # Lloyd from random rows may miss a corner
        torch.manual_seed(seed)
        (a, _), (b, test) = residual_kmeans(x, x[:3], 4, 2)
        if best is None or (x - b).norm() < (x - best[1]).norm():
            best = a, b, test
    _, b, test = best
    assert torch.allclose(b, x, atol=0.05) and torch.allclose(test, x[:3], atol=0.05)


def test_each_stage_lowers_the_error_and_test_is_not_fitted():
    torch.manual_seed(0)
    train, other = torch.randn(300, 8), torch.randn(300, 8) + 5
    errors = [(train - a).pow(2).mean().item() for a, _ in residual_kmeans(train, other, 8, 4)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.7 * errors[0]
    torch.manual_seed(0)
    again = [a for a, _ in residual_kmeans(train, other * 0, 8, 4)]
    torch.manual_seed(0)
    assert all(torch.equal(x, y) for x, (y, _) in zip(again, residual_kmeans(train, other, 8, 4)))
