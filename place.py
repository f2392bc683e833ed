"""--attention own: each symbol attends to another place, and gets nothing else of the image.

For position t, with patch tokens z_i, decoder state x_t and s_1 = 1:

    r_t = argmax_i  <q_t, z_i> / d^0.5 + ln s_t(i)                            the patch it points at
    m_t(i) = s_t(i) exp(-|i - r_t|^2 / 2 sigma^2)                             its share of the image
    a_t = softmax_i(<q_t, z_i> / d^0.5 + ln m_t(i)),  y_t = W sum_i a_t(i) f(z_i)           its map
    s_(t+1) = s_t - m_t                                                       what is left

The window is local attention (Luong et al. 2015, equation 10); what is left is stick-breaking, as
in MONet (Burgess et al. 2019) and GENESIS-V2 (Engelcke et al. 2021), to the end of coverage (Tu et
al. 2016): no two symbols are about one place. After PLACES symbols all is left again, so that
further symbols refine the same places. There is one map, in the last block, and the CLS is not
among the tokens: between positions nothing passes but symbols and what is left.
"""
import torch
import torch.nn.functional as F
from torch import nn

SIGMA = 0.2         # of the window, in sides of the image (our choice)
PLACES = 4          # our choice: the number of objects that `scenes` has at most
POINTING = 0.3      # weight of the loss of pointing (our choice; that of places has 1)
LEAST = 1e-6        # of what is left, and of a window, so that logarithms are finite


def windows(patches, device=None):
    """-> (N, N) in 0..1: row r is the window around patch r of a square grid of N patches."""
    axis = torch.arange(round(patches ** 0.5), device=device) / patches ** 0.5
    grid = torch.cartesian_prod(axis, axis)                                     # (N, 2)
    return (-torch.cdist(grid, grid).square() / (2 * SIGMA**2)).exp()


class PlaceAttention(nn.Module):
    """Cross-attention of one position at a time, see the top of this file; f(z) = z + MLP(z), and y
    goes through a second MLP, as it would in a further block."""

    def __init__(self, width, heads):
        super().__init__()
        self.to_q, self.out, self.listen = (nn.Linear(width, width) for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(),
                                 nn.Linear(2 * width, width))
        self.deep = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(),
                                  nn.Linear(4 * width, width))

    def start_state(self, tokens):
        """Patch tokens z (B, N, d) -> what the positions have in common: z, f(z), all windows, what
        is left (B, N), and the shares of the positions so far."""
        return {"tokens": tokens.float(), "values": tokens + self.mlp(tokens), "shares": [],
                "windows": windows(tokens.shape[1], tokens.device),
                "left": tokens.new_ones(tokens.shape[:2], dtype=torch.float)}

    def forward(self, x, state):
        """x (B, 1, d) -> y (B, 1, d), map (B, 1, 1, N); takes its share of what is left."""
        with torch.autocast(x.device.type, enabled=False):          # for the argmax
            q, left = self.to_q(x.float()) * x.shape[-1] ** -0.5, state["left"]
            scores = (q @ state["tokens"].transpose(1, 2))[:, 0]                # (B, N)
            soft = (scores + left.log()).softmax(-1)
            # One-hot, with the gradient of the softmax (straight-through)
            pointed = F.one_hot(soft.argmax(-1), soft.shape[-1]) + soft - soft.detach()
            share = left * (pointed @ state["windows"]).clamp(LEAST, 1)
            maps = (scores + share.log()).softmax(-1)[:, None, None]            # (B, 1, 1, N)
            state["shares"].append(share)
            again = len(state["shares"]) % PLACES == 0
            state["left"] = torch.ones_like(left) if again else (left - share).clamp(min=LEAST)
        y = self.out(maps[:, 0].to(state["values"].dtype) @ state["values"])
        return y + self.deep(x + y), maps

    def pointing_loss(self, embeddings, shares, tokens):
        """A symbol must identify its place in its image: the cross-entropy of its share,
        as a distribution, with softmax_i <P e_t, z_i> / d^0.5, the patches that match its embedding
        alone, without the decoder. embeddings (B, T, d), shares (B, T, N), tokens
        (B, N, d)."""
        scores = self.listen(embeddings) @ tokens.transpose(1, 2) * tokens.shape[-1] ** -0.5
        target = shares.detach() / shares.detach().sum(-1, keepdim=True)
        return -(target * scores.log_softmax(-1)).sum(-1).mean()


def place_loss(maps, shares, tokens, background):
    """A place must be of one thing: the squared error of the patch tokens z (B, N, d) when they are
    reconstructed from the mean token v_t of each place and one vector b (d,) for what is left,

        z_i ~ sum_t m_t(i) v_t + (1 - sum_t m_t(i)) b,     v_t = sum_i a_t(i) z_i

    with maps a and shares m (B, T, N): soft k-means of the patch tokens, which DINOSAUR (Seitzer et
    al. 2023) reconstructs too. A patch has the weight |z_i|^2: those of a plain background are
    short. Mean over rounds of PLACES symbols, in units of the tokens' mean square."""
    weight, errors = tokens.square().mean(-1), []
    for a, m in zip(maps.split(PLACES, 1), shares.split(PLACES, 1)):
        rest = 1 - m.sum(1)                                                     # (B, N)
        estimate = m.transpose(1, 2) @ (a @ tokens) + rest[..., None] * background
        errors.append((weight * (estimate - tokens).square().mean(-1)).mean() / weight.mean())
    return torch.stack(errors).mean()
