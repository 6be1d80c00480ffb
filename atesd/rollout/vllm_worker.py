"""Extension of vLLM's workers that loads the student's weights.

vLLM imports this file by name, in this process or in a server's, so it imports nothing of atesd:
`vllm serve ... --worker-extension-cls atesd.rollout.vllm_worker.StudentWeights`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

WORKER_EXTENSION = "atesd.rollout.vllm_worker.StudentWeights"


class StudentWeights:
    """Mixin of vLLM's worker class. Call its method through `collective_rpc`."""

    def load_student(self: Any, source: str | Iterable[tuple[str, Any]]) -> None:
        """Replaces the weights of the running engine.

        Args:
            source: `(name, tensor)` pairs under the checkpoint's names, or a folder with a full checkpoint.
        """
        place = {"weights_path": source} if isinstance(source, str) else {"weights_iterator": source}
        modules = list(self.model_runner.get_model().modules())
        if self.device.type == "cpu":  # vLLM packs experts when it makes their kernel only: let it make a new one
            for module in modules:
                if getattr(getattr(module, "quant_method", None), "moe_kernel", None) is not None:
                    module.quant_method.moe_kernel = None
        self.reload_weights(**place)
        # On a CPU vLLM multiplies by a packed copy of the head. reload_weights does not repack a tied head, so do it.
        for module in modules:
            if type(module).__name__ == "ParallelLMHead":
                module.quant_method.process_weights_after_loading(module)
