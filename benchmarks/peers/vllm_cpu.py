"""vLLM's CPU build, its engine stepped in this process. Runs in the environment of `environments.vllm`, not in the project's."""

import argparse
import itertools
import time

from vllm import LLM, SamplingParams

from benchmarks.peers.protocol import Answer, Job, Pipe


class Vllm:
    """One vLLM engine without tokenizer and prefix cache (no prompt is sent twice)."""

    def __init__(self, checkpoint: str, *, eager: bool) -> None:
        self._engine = LLM(
            model=checkpoint,
            skip_tokenizer_init=True,
            enforce_eager=eager,
            enable_prefix_caching=False,
            max_model_len=4096,
            max_num_seqs=256,
        ).llm_engine
        self._ids = itertools.count()

    def generate(self, job: Job) -> Answer:
        params = SamplingParams(max_tokens=job.max_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        times_s: dict[str, list[float]] = {str(next(self._ids)): [] for _ in job.prompts}
        started_s = time.perf_counter()
        for request_id, prompt in zip(times_s, job.prompts, strict=True):
            self._engine.add_request(request_id, {"prompt_token_ids": prompt}, params)
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            now_s = time.perf_counter() - started_s
            for output in outputs:
                times = times_s[output.request_id]
                times += [now_s] * (len(output.outputs[0].token_ids) - len(times))
        return Answer(list(times_s.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--eager", action="store_true")
    args = parser.parse_args()
    pipe = Pipe()
    pipe.serve(Vllm(args.checkpoint, eager=args.eager).generate)


if __name__ == "__main__":
    main()
