"""What the papers compare with and no kept library has as they ran it: AdaFisher, K-FAC, Shampoo, AdaHessian; and
Muon's two halves.

Written from equations; one module each, imported on demand, since they build on curvlinops and pytorch-optimizer. None
is a Kalman filter, none is part of `import koala`.
"""
