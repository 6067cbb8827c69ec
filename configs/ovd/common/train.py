"""The run itself: where, how long, on what. Every field is read by `ovd.engine.trainer.train`."""

train = dict(
    output="runs/detector_mini",
    max_iter=1000,
    log_every=20,
    checkpoint_every=200,
    device="auto",
    amp="auto",  # bfloat16 (or float16) on GPUs, float32 on the CPU; off, bfloat16, float16
    clip_norm=0.0,  # largest norm of all gradients together; 0: no clipping
    seed=0,
    half=False,  # store the final weights as float16
)

text = dict(
    # Short, like the captions that the miniature's towers were trained on.
    templates=["{}", "a {}", "a drawing of a {}", "a picture of a {}"],
    use_synonyms=True,  # average over LVIS's synonyms
)
