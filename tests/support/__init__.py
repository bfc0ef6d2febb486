"""What tests share: servers, writers that are killed, training runs, inputs in other layouts."""
