"""Other serving frameworks with the graph that our service has, each as its documentation would write it."""
