"""What runs inside a vLLM worker: taking over the student's weights.

Separate because vLLM imports it by name, in this process or in a server's:
`vllm serve ... --worker-extension-cls atesd.rollout.vllm_worker.StudentWeights`. It imports nothing of atesd.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

WORKER_EXTENSION = "atesd.rollout.vllm_worker.StudentWeights"


class StudentWeights:
    """Mixed into vLLM's worker class; its method is called through `collective_rpc`."""

    def load_student(self: Any, source: str | Iterable[tuple[str, Any]]) -> None:
        """Put other weights into the running engine.

        Args:
            source: `(name, tensor)` pairs under the checkpoint's names, or a folder with a whole checkpoint.
        """
        place = {"weights_path": source} if isinstance(source, str) else {"weights_iterator": source}
        self.reload_weights(**place)
        # vLLM multiplies by a packed copy of the head on a CPU and does not pack a head tied to the embedding again.
        for module in self.model_runner.get_model().modules():
            if type(module).__name__ == "ParallelLMHead":
                module.quant_method.process_weights_after_loading(module)
