"""MindFormers 1.9.0 trains our model with its own Trainer.

`mindformers_settings` reads a MindFormers YAML as this product's configuration, `mindformers_job` runs it,
`registration` holds the classes that it names, `import_mindformers` takes its checkpoint back. Sending a model there is
`pangu-sigma export --format mindformers`. Importing MindFormers takes seconds and writes folders
(`mindformers_job.environment` says where), so it is done on demand only.
"""
