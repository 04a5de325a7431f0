"""gRPC in: interceptors, and one thin servicer per noun."""
