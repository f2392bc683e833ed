"""--attention own: each symbol is of another place in the image, and of nothing else.

For position t, with patch tokens z_i at x_i, the decoder's output y_t, q_t = W y_t and s_1 = 1:

    u_t(i) = <q_t, z_i> / d^0.5 + ln |z_i|^2 + ln s_t(i)                    scores of the patches
    c_t = x_r, r = argmax_i u_t(i)                                          the patch it points at
    w_t(i) = exp(-|x_i - c_t|^2 / 2 sigma^2)                                the window around it
    a_t = softmax_i(u_t(i) + ln w_t(i)),  c_t = sum_i a_t(i) x_i            SHIFTS times
    h_t = sum_i a_t(i) z_i,  s_(t+1) = s_t - s_t w_t                        its map; what is left

The discretizer gets h_t, the mean token of the place, and not the decoder's output: what a symbol
stands for comes through its map. The decoder determines the place, from the symbols so far, and in
`stable` only place_loss has a gradient to it. The window is local attention (Luong et al. 2015,
equation 10), moved to the middle of what is there by mean shift (Comaniciu and Meer 2002); what is
left is stick-breaking, as in MONet (Burgess et al. 2019) and GENESIS-V2 (Engelcke et al. 2021), to
the end of coverage (Tu et al. 2016): no two symbols are of one place. After PLACES symbols, a
round, all is left again, and further symbols are of the same places. |z_i|^2 is of standardised
tokens, where a plain background is short (our choice).
"""
import torch
import torch.nn.functional as F
from torch import nn

SIGMA = 0.14        # of the window, in sides of the image (our choice)
SHIFTS = 3          # steps of mean shift (our choice)
PLACES = 4          # our choice: the number of objects that `scenes` has at most
LEAST = 1e-6        # of what is left, and of a window, so that logarithms are finite


def patch_grid(patches, device=None):
    """-> (N, 2) in 0..1: rows and columns of a square grid of N patches, in sides of the image."""
    axis = torch.arange(round(patches ** 0.5), device=device) / patches ** 0.5
    return torch.cartesian_prod(axis, axis)


def window(middle, grid):
    """middle (..., 2), grid (N, 2) -> (..., N) in LEAST..1."""
    square = (grid - middle[..., None, :]).square().sum(-1)
    return (-square / (2 * SIGMA**2)).exp().clamp(min=LEAST)


def mean_shift(scores, middle, grid):
    """scores u (..., N), middle c (..., 2) -> map a and window w (..., N) after SHIFTS steps."""
    for _ in range(SHIFTS):
        middle = (scores + window(middle, grid).log()).softmax(-1) @ grid
    w = window(middle, grid)
    return (scores + w.log()).softmax(-1), w


def log_weight(tokens):
    """(..., d) -> ln of the mean of z^2."""
    return tokens.float().square().mean(-1).clamp(min=LEAST).log()


class PlaceAttention(nn.Module):
    """The attention of one position at a time, see the top of this file."""

    def __init__(self, width):
        super().__init__()
        self.to_q = nn.Linear(width, width)

    def start_state(self, tokens):
        """Patch tokens z (B, N, d) -> what the positions have in common: z, ln |z|^2, the grid,
        what is left (B, N), and the shares s_t w_t of the positions so far."""
        return {"tokens": tokens.float(), "log_weight": log_weight(tokens), "shares": [],
                "grid": patch_grid(tokens.shape[1], tokens.device),
                "left": tokens.new_ones(tokens.shape[:2], dtype=torch.float)}

    def forward(self, y, state):
        """y (B, 1, d) -> h (B, 1, d), map (B, 1, 1, N); takes its share of what is left."""
        with torch.autocast(y.device.type, enabled=False):          # for the argmax
            q, left, grid = self.to_q(y.float()), state["left"], state["grid"]
            scores = (q @ state["tokens"].transpose(1, 2))[:, 0] * y.shape[-1] ** -0.5
            scores = scores + state["log_weight"] + left.log()                  # (B, N)
            soft = scores.softmax(-1)
            # One-hot, with the gradient of the softmax (straight-through)
            pointed = F.one_hot(soft.argmax(-1), soft.shape[-1]) + soft - soft.detach()
            maps, w = mean_shift(scores, pointed @ grid, grid)
            state["shares"].append(left * w)
            again = len(state["shares"]) % PLACES == 0
            state["left"] = torch.ones_like(left) if again else (left - left * w).clamp(min=LEAST)
            return maps[:, None] @ state["tokens"], maps[:, None, None]


# ---- for the recipe `stable` ---------------------------------------------------------------------

def place_loss(maps, shares, tokens, background):
    """A place must be of one thing: the squared error of the patch tokens z (B, N, d) when they are
    reconstructed from the mean token h_t of each place and one vector b (d,) for what is left,

        z_i ~ sum_t m_t(i) h_t + (1 - sum_t m_t(i)) b,     h_t = sum_i a_t(i) z_i

    with maps a and shares m = s w (B, T, N): soft k-means of the patch tokens, which DINOSAUR
    (Seitzer et al. 2023) reconstructs too. A patch has the weight |z_i|^2. Mean over rounds of
    PLACES symbols, in units of the tokens' mean square."""
    weight, errors = tokens.square().mean(-1), []
    for a, m in zip(maps.split(PLACES, 1), shares.split(PLACES, 1)):
        rest = 1 - m.sum(1)                                                     # (B, N)
        estimate = m.transpose(1, 2) @ (a @ tokens) + rest[..., None] * background
        errors.append((weight * (estimate - tokens).square().mean(-1)).mean() / weight.mean())
    return torch.stack(errors).mean()


def explained(a, shares, embeddings):
    """The part of h_t at map a that the codewords e of earlier rounds reconstruct: the sum over
    their positions u of <a, m_u> e_u. a (B, N), lists of m (B, N) and e (B, d) -> (B, d), or 0."""
    earlier = len(shares) // PLACES * PLACES
    return sum((a * m).sum(1, keepdim=True) * e.detach()
               for m, e in zip(shares[:earlier], embeddings[:earlier]))


def sample_places(tokens, count):
    """Places before training, where every q is 0: tokens (B, N, d) -> (B * count, d), the mean
    tokens of `count` places of each image, around patches that are drawn, with |z_i|^2."""
    scores, grid = log_weight(tokens), patch_grid(tokens.shape[1], tokens.device)
    middles = grid[scores.exp().multinomial(count)]                             # (B, count, 2)
    return (mean_shift(scores[:, None], middles, grid)[0] @ tokens).flatten(0, 1)
