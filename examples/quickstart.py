import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import mlo

x, y = map(torch.tensor, load_digits(return_X_y=True))
fit = lambda values, rows: cross_entropy(x[rows] @ values["w"] / 16, y[rows])  # noqa: E731
penalised = lambda values, rows: fit(values, rows) + values["penalty"].exp() * values["w"].square().sum()  # noqa: E731
sgd, adam = mlo.optimizer.SGD(learning_rate=1.0, momentum=0.9), mlo.optimizer.Adam(learning_rate=0.1)
w, penalty = torch.zeros(64, 10, dtype=torch.float64), torch.tensor(-5.0)
inner = mlo.Level("w", objective=penalised, variables=w, given=("penalty",), optimizer=sgd, steps=20)
outer = mlo.Level("penalty", objective=fit, variables=penalty, subject_to=("w",), optimizer=adam)
graph = mlo.Graph([inner, outer])
state = graph.init()
for _ in range(100):
    state, metrics = graph.step(state, {"w": slice(0, 200), "penalty": slice(200, 400)})
right = (x[400:] @ state.values["w"]).argmax(1) == y[400:]
print(f"penalty {state.values['penalty'].exp():.1e}, test accuracy {right.double().mean():.1%}")
