"""The optimizer: one step evaluates losses, records coefficients in the journal, and applies them.

The way of a batch in a ``lozo`` step of ``ZOTrainer``, each file once (``tests/laws/test_way_of_a_batch.py`` compares it with a run).
Down to the losses:

    training/trainer.py        ZOTrainer.training_step             the micro-batches of a step
    optim/optimizer.py         ZerothOrder.step                    the algorithm
    optim/preparation.py       Preparation.prepare                 redraws, and measurements where due
    optim/step_estimate.py     StepEstimate.measure                evaluation, transforms, learning rates
    optim/evaluator.py         Evaluator.evaluate                  which points; batched or sequential
    optim/work.py              split                               this worker's part
    optim/batched_forward.py   BatchedForward.losses               all points in one forward
    forward/model.py           PerturbedForward.evaluate_batched   directions are attached, none is drawn yet
    forward/overrides.py       Overrides.active                    the model reads perturbed parameters
    objectives/losses.py       ChoiceLoss.__call__                 per-example losses

The model that the loss function calls reads its parameters, layer by layer:

    forward/batched.py         batched_parameter                   a parameter at all points
    forward/batch_context.py   BatchContext.expanded_z             directions of the batch's rows
    subspaces/coordinate.py    Coordinate.draw                     directions in the subspace
    rng/directions.py          Directions.draw_together            their elements

The losses return, and become K coefficients; nothing larger goes on to the update:

    forward/losses.py          Losses.estimate                     the table of losses
    methods/estimators.py      Central.estimate                    coefficients

Down to the weights, as in a replay:

    optim/journal.py           Journal.append                      synced before the update
    optim/update.py            Updater.apply                       terms to the update rule
    subspaces/flat_buffer.py   FlatBuffer.descend                  the update of the coordinates
"""

from zotune.io.lazy import submodules

__getattr__ = submodules(__name__, "distributed", "federated")
