"""The generalised Jensen-Shannon divergence of each word, as trainers write it (arXiv:2306.13649, section 2)."""

import math

import torch
import torch.nn.functional as F


def jsd(student, teacher, beta=0.5, how="stack"):
    """``student`` and ``teacher`` are log-probabilities (..., V)."""
    if how == "stack":
        share = torch.tensor(beta, dtype=student.dtype)
        parts = [student + torch.log(1 - share), teacher + torch.log(share)]
        mixture = torch.logsumexp(torch.stack(parts), dim=0)
        of_teacher = F.kl_div(mixture, teacher, reduction="none", log_target=True)
        of_student = F.kl_div(mixture, student, reduction="none", log_target=True)
        return share * of_teacher + (1 - share) * of_student
    parts = [student + math.log1p(-beta), teacher + math.log(beta)]
    if how == "swapped":
        mixture = torch.stack(parts[::-1], dim=-1).logsumexp(-1)
        of_student = F.kl_div(mixture, student, reduction="none", log_target=True) * (2 - 2 * beta)
        of_teacher = F.kl_div(mixture, teacher.exp(), reduction="none") * (2 * beta)
        return (of_student + of_teacher) / 2
    assert how == "lerp"
    mixture = torch.logaddexp(*parts)
    of_student = F.kl_div(mixture, student, reduction="none", log_target=True)
    return torch.lerp(of_student, F.kl_div(mixture, teacher, reduction="none", log_target=True), beta)
