"""The gradient of one micro-batch: of the objective on the responses, and of a term on the references beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from atesd.data.problems import Problem
from atesd.models.batching import hidden_rows, pack
from atesd.models.top_entries import TopEntries
from atesd.objectives import Objective, ResponseTokens, TokenTotals
from atesd.run import Run
from atesd_kernels.integrations.backbone import AuxLoss


def add_gradient(
    run: Run,
    objective: Objective,
    student_hidden: Tensor,
    views: list[Tensor | TopEntries],
    aux: AuxLoss | None,
    tokens: ResponseTokens,
    num_tokens: int,
    totals: TokenTotals,
    loss_so_far: Tensor,
) -> Tensor:
    """Adds a micro-batch's gradient to the weights' and its statistics to `totals`. Returns its share of the loss.

    Backward runs in two parts: the head's gradient is accumulated before the layers' backward begins. The experts'
    auxiliary loss is a mean over a micro-batch, which counts by its share of the step's response tokens.

    Args:
        student_hidden: `(N, hidden)`, with the graph of the student's forward.
        views: the teacher's, `(N, hidden)` each, or a server's top entries; none if the objective needs no teacher.
        num_tokens: the denominator, tokens of the step over all processes.
        loss_so_far: of the step's earlier micro-batches.
    """
    teacher_head = None if run.teacher.shares_head else run.teacher.head
    teacher_hidden = run.views.target(views, student_hidden) if views else None
    states = student_hidden.detach().requires_grad_()
    loss, stats = objective(states, run.student.head, teacher_hidden, teacher_head, tokens, num_tokens)
    with torch.autocast(run.device.type, enabled=False):
        run.parallelism.loss_for_backward(loss, loss_so_far).backward()
        roots, gradients = [student_hidden], [states.grad]
        if aux is not None:
            weighted = totals.add_aux_loss(aux, len(tokens.targets) / num_tokens)
            if weighted.requires_grad:
                roots.append(run.parallelism.loss_for_backward(weighted, loss_so_far))
                gradients.append(None)
            loss = loss.detach() + weighted.detach()
        torch.autograd.backward(roots, gradients)
    totals.add(stats)
    return loss.detach()


def add_imitation(
    run: Run, problems: list[Problem], num_tokens: int, totals: TokenTotals, loss_so_far: Tensor
) -> Tensor:
    """Adds the gradient of `run.imitation` on the problems' references, each once. Returns its share of the loss.

    `num_tokens` are the references' tokens in the step, over all processes.
    """
    prompts, replies, weights = run.data.imitated(problems)
    batch = pack(prompts, replies, run.device)
    with run.phase("student"):
        hidden = hidden_rows(run.student.backbone, batch)
    with run.phase("loss_backward"):
        tokens, unused = ResponseTokens(batch.targets, batch.lengths, sample_weights=weights), TokenTotals()
        share = add_gradient(run, run.imitation, hidden, [], None, tokens, num_tokens, unused, loss_so_far)
    totals.imitation.append(share.double())
    return share
