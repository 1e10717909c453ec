"""What the assigners are tried on: box sets, scenes, workloads, real labels and pinned counterexamples."""
