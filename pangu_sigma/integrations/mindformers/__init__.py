"""MindFormers 1.9.0 trains our model with its own Trainer.

`settings` reads a MindFormers YAML as this product's configuration, `job` runs it, `registered` holds the classes that
it names, `importing` takes its checkpoint back. Sending a model there is `pangu-sigma export --format mindformers`.
Importing MindFormers takes seconds and writes folders (`job.environment` says where), so it is done on demand only.
"""
