"""Our model behind lm-eval against lm-eval's own `hf` backend, item by item: `python -m experiments.lm_eval_parity`.

Needs the environment of `make parity`, SmolLM2 (`make smollm2`) and BILEVEL_JAX_DATA; prints a Markdown table. Both sides use
float32. For the request with the largest difference, it also shows the errors relative to the `hf` backend in float64. A request
is a context with one of its choices.
"""

import time

from absl import flags

from bilevel_jax import cli

FLAGS = flags.FlagValues()
MODEL = flags.DEFINE_string("model", "local/smollm2", "Model directory.", flag_values=FLAGS)
TASKS = flags.DEFINE_list(
    "tasks", ["local_arc_easy", "local_boolq", "local_hellaswag", "local_piqa", "local_winogrande"], "Tasks.", flag_values=FLAGS
)
LIMIT = flags.DEFINE_integer("limit", 100, "Items of each task.", flag_values=FLAGS)
COLUMNS = ["task", "items", "requests", "acc, hf", "acc, ours", "acc_norm, hf", "acc_norm, ours"]
COLUMNS += ["most nats apart", "there hf off by", "ours off by", "greedy differs", "seconds, hf", "seconds, ours"]


def scores(samples) -> list[tuple[float, bool]]:
    """(log-likelihood, is greedy) of every request."""
    return [response[0] for sample in samples for response in sample["resps"]]


def main() -> None:
    import numpy as np
    from lm_eval import evaluator
    from lm_eval.api.instance import Instance
    from lm_eval.models import huggingface as official
    from lm_eval.tasks import TaskManager

    from bilevel_jax.data import templates
    from bilevel_jax.evaluate import lm_eval_adapter
    from bilevel_jax.models import huggingface

    model, base = huggingface.load_model(MODEL.value)
    tokenizer = templates.load_tokenizer(MODEL.value)
    hf_model = official.HFLM(MODEL.value, device="cpu", dtype="float32", batch_size=8)
    ours = lm_eval_adapter.JaxLM(model, base, None, tokenizer, huggingface.eos_ids(MODEL.value, tokenizer))

    def run(lm, task: str):
        start = time.perf_counter()
        manager = TaskManager(include_path="bilevel_jax/evaluate/tasks", include_defaults=False)
        results = evaluator.simple_evaluate(lm, tasks=[task], limit=LIMIT.value, task_manager=manager, bootstrap_iters=0)
        return results["results"][task], results["samples"][task], time.perf_counter() - start

    def exact(request) -> float:
        hf_model.model.double()
        ((log_likelihood, _),) = hf_model.loglikelihood([Instance("loglikelihood", {}, tuple(request), 0)])
        hf_model.model.float()  # restores the weights exactly
        return log_likelihood

    print("| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS), flush=True)
    for task in TASKS.value:
        (hf, hf_samples, hf_seconds), (jax, jax_samples, jax_seconds) = run(hf_model, task), run(ours, task)
        if [sample["arguments"] for sample in hf_samples] != [sample["arguments"] for sample in jax_samples]:
            raise ValueError(f"{task}: the two sides got different requests")
        hf_scores, jax_scores = np.array(scores(hf_samples)), np.array(scores(jax_samples))
        difference = np.abs(hf_scores - jax_scores)
        worst, greedy = difference[:, 0].argmax(), int(difference[:, 1].sum())
        truth = exact([request for sample in jax_samples for request in sample["arguments"]][worst])
        errors = [f"{abs(side[worst, 0] - truth):.1e}" for side in (hf_scores, jax_scores)]
        measures = [f"{side[key]:.3f}" if key in side else "" for key in ("acc,none", "acc_norm,none") for side in (hf, jax)]
        cells = [task, len(jax_samples), len(jax_scores), *measures, f"{difference[worst, 0]:.1e}", *errors, greedy]
        cells += [f"{hf_seconds:.0f}", f"{jax_seconds:.0f}"]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    cli.run(main, FLAGS)
