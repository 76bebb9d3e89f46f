"""Growth inside other trainers.

`lightning` and `huggingface` each provide a callback; a loop of your own needs no more than this:

    from growconv import GrowthScheduler, find_sites

    sites = find_sites(model, example)
    scheduler = GrowthScheduler(model, optimizer, sites, method="tiny", every=100, times=4, amount=0.25)
    step = 0
    for epoch in range(epochs):
        for inputs, targets in train_loader:
            optimizer.zero_grad()
            loss(model(inputs), targets).backward()
            optimizer.step()
            step += 1
            if scheduler.due(step, {"epoch": epoch}):
                scheduler.grow(growth_batches(), loss)
    torch.save({"model": model.state_dict(), "growth": scheduler.state_dict()}, path)

`growth_batches()` gives a few (inputs, targets) pairs of training data. To load the file again, build the small model,
call `GrowthHistory.from_records(saved["growth"]["history"]).replay(model)` and then
`model.load_state_dict(saved["model"])`. Under DistributedDataParallel, give the scheduler the raw model, and continue
with `growconv.growth.rewrap(wrapped)` after a growth.
"""
