"""How tests write a run log."""

from cabs import RunLog


def write(path, controller, steps, mode="x"):
    """Write some steps of a run whose batch sizes grow, and return the decisions."""
    decisions = []
    with RunLog(path, controller, mode=mode) as log:
        for step in range(controller.step, controller.step + steps):
            decision = controller.update(
                learning_rate=0.1, variance_trace=100.0 + 50.0 * step, loss=1.0
            )
            log.write(decision, examples=16, accuracy=0.5)
            decisions.append(decision)
    return decisions
