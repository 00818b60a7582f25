"""OLMoE: dropless top-k of softmax probabilities (Muennighoff et al. 2024, arXiv 2409.02060, sections 2 and 4.1)."""

from __future__ import annotations

from mindspore import Tensor, nn, ops

from rre.routers.auxiliary_losses import BalanceLoss, PooledBalanceLoss, PooledMeans, ZLoss
from rre.routers.learned_gate import Gate, LearnedRouter


class OlmoeRouter(LearnedRouter):
    """The k largest softmax probabilities choose and weigh; `renormalise` divides them by their sum (OLMoE does not).

    Auxiliary loss: weight * E * sum_e f_e P_e + z weight * mean (logsumexp logits)^2. f_e is the share of the T k
    choices that fell on e, that is, divided by k (MegaBlocks' form, with which OLMoE was trained; the paper's text and
    Hugging Face's code do not divide, and are k times this). The layers' losses are added up; MegaBlocks takes their
    mean. `pooled` is Hugging Face's form (transformers 4.57, `load_balancing_loss_func`): f, not divided by k, and P
    are means over all layers before they are multiplied.
    """

    @property
    def pooled(self) -> bool:
        """Whether the balance loss is of all layers together."""
        return self.options.setting("balance") == "pooled"

    def pool(self) -> nn.Cell | None:
        options = self.options
        if not self.pooled:
            return None
        return PooledBalanceLoss(options.setting("aux_loss_weight"), options.groups.total, options.layout)

    def cell(self) -> nn.Cell:
        return OlmoeGate(self)


class OlmoeGate(Gate):
    """OLMoE top-k gate inside the graph; see `Gate`."""

    def __init__(self, router: OlmoeRouter) -> None:
        super().__init__(router)
        options, layout = router.options, router.options.layout
        self.renormalise = options.setting("renormalise")
        two = ("rows", 1)
        self.top = layout(ops.TopK(sorted=True), two)
        self.take = layout(ops.GatherD(), two, two)
        self.div = layout(ops.Div(), two, two)
        self.row_sum = layout(ops.ReduceSum(keep_dims=True), two)
        self.pooled = router.pooled
        if self.pooled:
            self.means = PooledMeans(layout, options.exchange)
        self.balance = BalanceLoss(options.setting("aux_loss_weight"), self.experts, layout, options.exchange)
        self.z_loss = ZLoss(options.setting("z_loss_weight"), layout, options.exchange)

    def choose(self, x_TD: Tensor, noise: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        logits_TE = self.logits(x_TD, self.weight)
        probs_TE = self.softmax(logits_TE)
        _, ids_TK = self.top(ops.stop_gradient(probs_TE), self.choices)
        weights_TK = self.take(probs_TE, 1, ids_TK)
        if self.renormalise:
            weights_TK = self.div(weights_TK, self.row_sum(weights_TK, 1))
        return ids_TK, weights_TK, probs_TE, logits_TE

    def auxiliary(self, hits_TKE: Tensor, chosen: tuple[Tensor, ...], text: tuple[Tensor, ...]) -> Tensor:
        if self.pooled:
            return self.means(hits_TKE, chosen[2], self.z_loss(chosen[3], text), text)
        return self.balance(hits_TKE, chosen[2], text) + self.z_loss(chosen[3], text)
