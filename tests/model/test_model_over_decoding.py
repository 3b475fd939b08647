"""Over-decoding in one process: losses and every gradient of the formula in float64, over-encoded and plain, tied and untied.

The formula (arXiv 2501.16975, section 3): table j predicts the token j ahead from the last hidden state; the losses are means
over the positions that have such a token, times their weights. The backbone of the reference is transformers' Olmo2.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from overtok_megatron.config.constants import IGNORE_INDEX
from overtok_megatron.config.derived import further_tokens, tokens_per_step
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.model.heads import LaterTokens
from overtok_megatron.model.transformer import Transformer
from overtok_megatron.training.later_tokens import later_targets
from support.assembling import cpu_model, cpu_reader, cpu_tables
from support.layouts import BATCH, EOD, SEQ, TIED, VOCAB, layout, layout_config, stream
from support.reference import hugging_face_model, hugging_face_names

PLAIN = {"enabled": False}


def configuration(
    num_tokens: int, low_rank: int | None, over: dict[str, Any], model: dict[str, Any], weight: float = 0.3
) -> RunConfig:
    weights = [weight, weight / 2][: num_tokens - 1]
    section = {"num_tokens": num_tokens, "loss_weights": weights, "low_rank": low_rank}
    return layout_config(layout("", micro=BATCH, over=over, model=model, sections={"over_decoding": section}))


def taken(batch: Tensor, further: int, end: int | None = None) -> LaterTokens:
    """What heads take of a whole batch in one process."""
    targets = tuple(later_targets(batch, further, end))
    counts = torch.tensor([float((target != IGNORE_INDEX).sum()) for target in targets])
    return LaterTokens(targets, (), BATCH * SEQ / counts)


class Formula:
    """float64 leaves: Olmo2, the embedding's parts and the output tables; `losses` of a batch by name, and the objective."""

    def __init__(self, config: RunConfig, ours: Transformer) -> None:
        self.config = config
        self.backbone = hugging_face_model(config.model).double()
        names = hugging_face_names(ours)
        self.backbone.load_state_dict({name: weight.detach().double() for name, weight in names.items()})
        self.leaves = {
            name: nn.Parameter(weight.detach().double())
            for name, weight in ours.named_parameters()
            if name.startswith(("over_decoding.", "embedding.over_encoding."))
        }

    def losses(self, batch: Tensor, rows: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        """rows [G, s, T, w]: of the n-grams that end at each position."""
        tokens = batch[:, :SEQ]
        embedded = self.backbone.get_input_embeddings()(tokens)
        if rows is not None:
            (projection,) = (w for name, w in self.leaves.items() if name.startswith("embedding.over_encoding."))
            embedded = embedded + rows.flatten(2) @ projection.t()  # combine: sum
        result = self.backbone(inputs_embeds=embedded, output_hidden_states=True)
        hidden = result.hidden_states[-1]
        found = {"main": self._mean(result.logits, batch, 1)}
        objective = found["main"]
        for index, weight in enumerate(self.config.over_decoding.loss_weights):
            name = f"over_decoding.tables.{index + 2}"
            x = hidden
            if f"{name}.projection" in self.leaves:
                x = x @ self.leaves[f"{name}.projection"].t()
            loss = self._mean(x @ self.leaves[f"{name}.weight"].t(), batch, index + 2)
            found[f"over_decoding_{index + 2}"] = loss
            objective = objective + weight * loss
        return found, objective

    def _mean(self, logits: Tensor, batch: Tensor, ahead: int) -> Tensor:
        """-sum of log softmax at the token `ahead` behind each position, over the positions that have one."""
        total, count = logits.new_zeros(()), 0
        for row, line in enumerate(batch.tolist()):
            for t in range(SEQ):
                if line[t + ahead] != IGNORE_INDEX:
                    total = total - logits[row, t].log_softmax(-1)[line[t + ahead]]
                    count += 1
        return total / count


@pytest.mark.parametrize("model", [{}, TIED], ids=["own head", "tied"])
@pytest.mark.parametrize("over", [{}, PLAIN], ids=["over-encoded", "plain"])
@pytest.mark.parametrize(("num_tokens", "low_rank"), [(2, None), (2, 5), (3, None), (3, 5)])
def test_losses_and_every_gradient_are_the_formulas(
    num_tokens: int, low_rank: int | None, over: dict[str, Any], model: dict[str, Any]
) -> None:
    config = configuration(num_tokens, low_rank, over, model)
    ours = cpu_model(config, eod_id=EOD)
    batch = stream(further_tokens(config))[0]
    fetched, rows = None, None
    if config.over_encoding.enabled:
        fetched = cpu_tables(config, EOD).fetch_rows(batch[None, :, :SEQ], training=True)[0]
        rows = nn.Parameter(fetched.gather().detach().double())
    found = ours(batch[:, :SEQ], fetched, batch[:, 1 : 1 + SEQ], later=taken(batch, further_tokens(config)))
    found.objective.backward()
    formula = Formula(config, ours)
    losses, objective = formula.losses(batch, rows)
    objective.backward()

    num_tokens_of_batch = tokens_per_step(config)
    assert found.main_loss.item() / num_tokens_of_batch == pytest.approx(losses["main"].item(), rel=1e-6)
    assert found.objective.item() / num_tokens_of_batch == pytest.approx(objective.item(), rel=1e-6)
    assert found.auxiliary_losses.keys() == losses.keys() - {"main"}
    for ahead in range(2, num_tokens + 1):
        scored = (batch[:, ahead : ahead + SEQ] != IGNORE_INDEX).sum().item()
        assert scored < BATCH * SEQ  # the stream ends before the last tokens of some samples
        name = f"over_decoding_{ahead}"
        assert found.auxiliary_losses[name].item() / scored == pytest.approx(losses[name].item(), rel=1e-6)
    wanted = {name: weight.grad for name, weight in formula.backbone.named_parameters()}
    gradients = hugging_face_names(ours, lambda weight: weight.grad)
    pairs = {name: (gradients[name], wanted[name]) for name in wanted}
    pairs |= {name: (ours.get_parameter(name).grad, leaf.grad) for name, leaf in formula.leaves.items()}
    assert len([name for name in pairs if name.startswith("over_decoding")]) == (num_tokens - 1) * (
        2 if low_rank else 1
    )
    if rows is not None and fetched is not None:
        # A slot gets the sum over the look-ups of its row.
        assert rows.grad is not None
        own = fetched.rows.gradients(torch.device("cpu")).total
        pairs["rows"] = (
            own,
            torch.zeros_like(own).double().index_add(0, fetched.slots.flatten(), rows.grad.flatten(0, 2)),
        )
    for name, (own, theirs) in pairs.items():
        assert own is not None and theirs is not None, name
        distance = (own.double() / num_tokens_of_batch - theirs).norm() / theirs.norm()
        assert distance < 2e-5, (name, distance)


def test_within_documents_a_position_scores_its_own_document_only() -> None:
    """Of [a b END c d e]: END belongs to the document that it ends; b's token two ahead is in the next one."""
    end, gone = 9, IGNORE_INDEX
    batch = torch.tensor([[1, 2, end, 3, 4, 5, end, 6], [1, 2, 3, 4, 5, gone, gone, gone]])
    first, second = later_targets(batch, 2, end)
    assert first.tolist() == [[end, gone, gone, 5, end], [3, 4, 5, gone, gone]]
    assert second.tolist() == [[gone, gone, gone, end, gone], [4, 5, gone, gone, gone]]
    first, second = later_targets(batch, 2)
    assert first.tolist() == [[end, 3, 4, 5, end], [3, 4, 5, gone, gone]]
    assert second.tolist() == [[3, 4, 5, end, 6], [4, 5, gone, gone, gone]]


def test_initial_weights_do_not_depend_on_the_number_of_tables() -> None:
    plain = layout_config(layout("", micro=BATCH))
    weights = [
        dict(cpu_model(one).named_parameters()) for one in (plain, *(configuration(n, None, {}, {}) for n in (2, 3)))
    ]
    for fewer, more in ((0, 1), (0, 2), (1, 2)):
        assert weights[fewer].keys() < weights[more].keys()
        for name, weight in weights[fewer].items():
            assert torch.equal(weight, weights[more][name]), name
    tables = [weights[2][f"over_decoding.tables.{ahead}.weight"] for ahead in (2, 3)]
    assert not torch.equal(*tables)
    assert tables[0].shape == (VOCAB, 48)


def test_logits_are_those_of_the_loss() -> None:
    config = configuration(3, 5, {}, {})
    ours = cpu_model(config, eod_id=EOD)
    batch = stream(2)[0]
    fetched = cpu_reader(config, EOD).fetch_rows(batch[:, :SEQ])
    later = taken(batch, 2)
    with torch.no_grad():
        found = ours(batch[:, :SEQ], fetched, batch[:, 1 : 1 + SEQ], later=later)
        normed = ours.head.norm(ours.hidden(batch[:, :SEQ], fetched)[0])
        assert ours.over_decoding is not None
        for index, table in enumerate(ours.over_decoding.tables.values()):
            logits = table.logits(normed, ours.head.gathered(normed)).float()
            loss = nn.functional.cross_entropy(
                logits.flatten(0, 1), later.targets[index].flatten(), reduction="sum", ignore_index=IGNORE_INDEX
            )
            assert found.auxiliary_losses[f"over_decoding_{index + 2}"].item() == pytest.approx(loss.item(), rel=1e-6)


def test_evaluation_computes_the_main_loss_only() -> None:
    config = configuration(3, 5, {}, {})
    ours = cpu_model(config, eod_id=EOD).eval()
    batch = stream(2)[0]
    fetched = cpu_reader(config, EOD).fetch_rows(batch[:, :SEQ])
    with torch.no_grad():
        found = ours(batch[:, :SEQ], fetched, batch[:, 1 : 1 + SEQ])
    assert found.auxiliary_losses == {}
    assert torch.equal(found.objective, found.main_loss)
