"""The loss of a CPU's training: the output layer sees the positions of completions alone, in the base's dtype.

TRL's own loss is made for Triton. Without it TRL scores prompts too and converts the output layer to float32 in each
step, which is most of the time where the vocabulary is large.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from trl.trainer.sft_trainer import SFTTrainer


class CompletionTrainer(SFTTrainer):
    """TRL's trainer with the loss above; its entropy and accuracy of tokens are not measured."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the mean negative log-likelihood of the labelled tokens, and the outputs where asked for."""
        labels = inputs["labels"][:, 1:]
        scored = labels != -100
        head = self.accelerator.unwrap_model(model).get_output_embeddings()

        def keep_scored(_: nn.Module, hidden: tuple[Tensor]) -> tuple[Tensor]:
            return (hidden[0][:, :-1][scored],)

        hook = head.register_forward_pre_hook(keep_scored)  # a model scales and caps its logits whatever their shape
        try:
            outputs = model(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False)
        finally:
            hook.remove()
        total = cross_entropy(outputs.logits.float(), labels[scored], reduction="sum")
        loss = total / (scored.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # whose gradients are averaged
        return (loss, outputs) if return_outputs else loss
