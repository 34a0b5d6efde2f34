"""Changes towards the roofline, for roofline.md: what was predicted, what was done, what was counted and measured.

Newest last. `counted` has figures of benchmarks.count before and after the change; `measured` stays empty until a
GPU has run both.
"""

CHANGES = (
    {
        "stage": "encoder",
        "predicted": "a block of one width reads or writes all its values 17 times, its convolutions 4 of these; the "
        "additions of biases (which cuDNN does apart), residuals and the padding need not go over memory by themselves",
        "change": "biases and residuals are added by the norm that reads them, which takes its statistics on the way; "
        "no padded copies",
        "counted": "64 pictures: 253 GB in 163 operations before, 178 in 118 after; beside the products 190 and 114",
        "measured": "",
    },
    {
        "stage": "train",
        "predicted": "peft's modules go 10 times over a projection's result and 11 times over its input beside the two "
        "wide products, and keep a dropped copy and a mask of every input",
        "change": "a projection and its adapter in one function (kernels/lora.py): the product adds, masks are made "
        "where they are used",
        "counted": "a pack of 13,978 ids: 1,171 GB and 111.5 GB held before, 693 and 81.1 after; with selective "
        "recomputation 1,564 and 61.9 before, 766 and 61.0 after",
        "measured": "",
    },
    {
        "stage": "text, pictures, vqa",
        "predicted": "every assignment of a number by index waits for all that was launched, so that each new request "
        "stops those that run; in a captured step it is an error",
        "change": "numbers are filled in, or lie on the device",
        "counted": "host syncs: 6 for a request that joins and 1 in each step before, 0 and 0 after",
        "measured": "",
    },
)
