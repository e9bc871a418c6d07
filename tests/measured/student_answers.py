"""Answers to the exercises: wrong ones that earlier graders let pass, and right ones in other words.

WRONG: (exercise, the project's code, what stands in its place, a word of the message it should
get). RIGHT: the same without a message. Where code is a list, each is replaced by its counterpart.
"""

WRONG = [(1,
  ['    scores = scores.masked_fill(~causal_mask(n_keys, window, q.device, positions), '
   '-torch.inf)\n',
   '        mask = None if is_plain else causal_mask(n_keys, window, q.device, positions)\n'],
  ['    scores = scores.masked_fill(~causal_mask(n_keys, window, q.device), -torch.inf)\n',
   '        mask = None if is_plain else causal_mask(n_keys, window, q.device)\n'],
  'positions'),
 (1, 'is_plain = positions is None and (window', 'is_plain = (window', 'positions'),
 (1,
  'return Heads(None, q, k, v, z_cat=z.transpose(1, 2).flatten(-2))',
  'return Heads(None, q_by_head, k_by_head, v_by_head, z_cat=z.transpose(1, 2).flatten(-2))',
  'goes along'),
 (1,
  'pattern = scores.softmax(-1, dtype=wide_dtype(scores)).to(v.dtype)',
  'pattern = scores.softmax(-1, dtype=wide_dtype(scores))',
  'type'),
 (2,
  'return z - self.b_dec if self.subtracts_b_dec else z',
  'return z - self.b_dec',
  'transcoder'),
 (2,
  'f = pre * (pre > self.threshold)\n'
  '        return keep_largest(f, self.top_k) if self.top_k else f\n',
  'f = keep_largest(pre, self.top_k) if self.top_k else pre\n'
  '        return f * (f > self.threshold)\n',
  'top_k'),
 (2,
  'f = pre * (pre > self.threshold)\n'
  '        return keep_largest(f, self.top_k) if self.top_k else f\n',
  'f = pre * (pre > self.threshold)\n'
  '        return keep_largest(f.flatten(), self.top_k).view_as(f) if self.top_k else f\n',
  'row'),
 (3,
  'target = z if target is None else target\n    x = sae',
  'target = z\n    x = sae',
  'target'),
 (3,
  'if sae.subtracts_b_dec:\n        d_b_dec = d_b_dec',
  'if True:\n        d_b_dec = d_b_dec',
  'transcoder'),
 (3, 'x = sae.encoder_input(z)\n', 'x = z - sae.b_dec\n', 'transcoder'),
 (3,
  'f = sae.encode(z)\n    active = f != 0\n',
  'pre = sae.pre_activations(z)\n    active = pre > sae.threshold\n    f = pre * active\n',
  'TopK'),
 (3,
  'd_pre = (g @ sae.W_dec.T + l1 / B) * active',
  'd_pre = (g @ sae.W_dec.T + l1 / B) * (sae.pre_activations(z) > 0)',
  'threshold'),
 (4,
  'sae.W_dec /= sae.W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-12)',
  'norms = sae.W_dec.norm(dim=-1, keepdim=True)\n'
  '    sae.W_dec /= norms\n'
  '    sae.b_enc *= norms[:, 0]',
  'only W_dec'),
 (4,
  'sae.W_dec /= sae.W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-12)',
  'sae.W_dec /= sae.W_dec.norm(dim=-1, keepdim=True)\n'
  '    sae.b_dec /= sae.b_dec.norm().clamp_min(1e-12)',
  'biases stay'),
 (5,
  'error = (sae(z) - target).square().sum(-1).cpu().double()           # (B,)',
  'error = (sae(z) - target).abs().sum(-1).cpu().double()',
  'square'),
 (7,
  '    reset_adam(optimizer.state[sae.W_dec], dead, feature_dim=0)\n'
  '    reset_adam(optimizer.state[sae.W_enc], dead, feature_dim=1)\n'
  '    reset_adam(optimizer.state[sae.b_enc], dead, feature_dim=0)\n',
  '',
  'Adam'),
 (7,
  '    reset_adam(optimizer.state[sae.W_dec], dead, feature_dim=0)\n'
  '    reset_adam(optimizer.state[sae.W_enc], dead, feature_dim=1)\n'
  '    reset_adam(optimizer.state[sae.b_enc], dead, feature_dim=0)\n',
  '    reset_adam(optimizer.state[sae.W_dec], dead, feature_dim=0)\n'
  '    reset_adam(optimizer.state[sae.W_enc], dead, feature_dim=1)\n',
  'Adam'),
 (7,
  'drawn = draw_badly_reconstructed(sae, z, target, int(dead.sum()), generator)',
  'drawn = draw_badly_reconstructed(sae, z, target, 1, generator)',
  'each'),
 (7,
  'drawn = draw_badly_reconstructed(sae, z, target, int(dead.sum()), generator)',
  'drawn = torch.randint(len(z), (int(dead.sum()),), generator=generator)',
  'badly'),
 (7,
  'drawn = draw_badly_reconstructed(sae, z, target, int(dead.sum()), generator)',
  'drawn = draw_badly_reconstructed(sae, z, target, int(dead.sum()), '
  'torch.Generator().manual_seed(0))',
  'generator'),
 (7,
  'drawn = draw_badly_reconstructed(sae, z, target, int(dead.sum()), generator)',
  'drawn = (sae(z) - target).square().sum(-1).argsort(descending=True)\n'
  '    drawn = drawn.repeat(len(dead) // len(drawn) + 1)[:int(dead.sum())]',
  'draw with'),
 (7,
  'drawn = draw_badly_reconstructed(sae, z, target, int(dead.sum()), generator)',
  'drawn = draw_badly_reconstructed(sae, z, z, int(dead.sum()), generator)',
  'target'),
 (7,
  'sae.W_dec[dead] = F.normalize(target[drawn] - sae.b_dec, dim=-1)',
  'sae.W_dec[dead] = F.normalize(z[drawn] - centre, dim=-1)',
  'target'),
 (7, 'centre = sae.b_dec if sae.subtracts_b_dec else mean_in', 'centre = sae.b_dec', 'different spaces'),
 (7,
  '    if not sae.subtracts_b_dec:                             # then the centre is still in the '
  'input\n'
  '        sae.b_enc[dead] -= centre @ columns\n',
  '',
  'b_enc'),
 (8,
  'losses = F.cross_entropy(logits.float().flatten(0, 1), next_token.flatten(), '
  'reduction="none")',
  'losses = F.cross_entropy(logits.flatten(0, 1), next_token.flatten(), reduction="none")',
  'float32'),
 (9,
  'return norms / norms.sum(-1, keepdim=True).clamp_min(1e-30)',
  'return norms / norms.sum().clamp_min(1e-30)',
  'sum of these norms'),
 (12,
  '    lengths = classes.new_zeros(B, T, T)\n'
  '    for q in range(1, T):\n'
  '        lengths[:, q, 1:q + 1] = same[:, q, :q] * (1 + lengths[:, q - 1, :q])\n',
  '    lengths = classes.new_zeros(B, T, T)\n'
  '    for b in range(B):\n'
  '        for q in range(T):\n'
  '            for k in range(1, q + 1):\n'
  '                n = 0\n'
  '                while k - 1 - n >= 0 and classes[b, q - n] == classes[b, k - 1 - n] and '
  'classes[b, q - n] >= 0 and n < q - k + 1:\n'
  '                    n += 1\n'
  '                lengths[b, q, k] = n\n',
  'overlap'),
 (12,
  '    lengths = classes.new_zeros(B, T, T)\n'
  '    for q in range(1, T):\n'
  '        lengths[:, q, 1:q + 1] = same[:, q, :q] * (1 + lengths[:, q - 1, :q])\n',
  '    lengths = classes.new_zeros(B, T, T)\n'
  '    for b in range(B):\n'
  '        for q in range(T):\n'
  '            for k in range(1, q + 1):\n'
  '                n = 0\n'
  '                while k - 1 - n >= 0 and classes[b, q - n] == classes[b, k - 1 - n] and '
  'classes[b, q - n] >= 0 and n < 3:\n'
  '                    n += 1\n'
  '                lengths[b, q, k] = n\n',
  'any length'),
 (13,
  'i = feature_of_row[row]                                 # (n,) the feature that goes there',
  'i = torch.as_tensor(feature).expand(len(row))',
  'row of the batch'),
 (13,
  ['f = sae.encode(read[where].to(sae.b_dec.dtype))         # (n,d_sae)',
   'f_i = f.gather(1, i[:, None])                           # (n,1)'],
  ['f = sae.encode(written[where].to(sae.b_dec.dtype))',
   'f_i = f.gather(1, i[:, None])                           # (n,1)'],
  'read'),
 (13, 'edited = written.clone()', 'edited = read.clone()', 'written'),
 (13,
  'edited[where] += ((value - f_i) * sae.W_dec[i]).to(written.dtype)',
  'edited[where] += torch.where(f_i > 0, (value - f_i) * sae.W_dec[i], 0.0).to(written.dtype)',
  'not active'),
 (14,
  '    if low <= 0:\n        return None, None\n',
  '    if (clean - zero).min() <= 0:\n        return None, None\n',
  'single prompts'),
 (14,
  'return float(ratio(np.arange(len(clean)))), bootstrap(ratio, len(clean))',
  'value, interval = float(ratio(np.arange(len(clean)))), bootstrap(ratio, len(clean))\n'
  '    return value, [max(0.0, interval[0]), min(1.0, interval[1])]',
  'clipped'),
 (1, 'is_causal=is_plain, scale=scale)', 'is_causal=is_plain)', 'scale='),
 (3, '"W_dec": f.T @ g', '"W_dec": g.T @ f', 'dL/dW_dec has the shape of W_dec'),
 (3, 'd_b_dec = g.sum(0)', 'd_b_dec = g.mean(0)', 'not a mean'),
 (5, 'n, replacement=True, generator', 'n, replacement=False, generator', 'replacement'),
 (6, '.mean(feature_dim, keepdim=True)', '.mean(feature_dim)', 'keepdim'),
 (7,
  '    if not dead.any() or not live.any():\n        return\n',
  '',
  'no feature is dead'),
 (8,
  'return (ablated - sae).mean() / (ablated - clean).mean()',
  'return (ablated - sae).sum() / (ablated - clean).mean()',
  'two means'),
 (10,
  'return pattern * torch.einsum("bkhd,hd->bhk", v, w)[:, :, None]     # d_head is summed first',
  'return pattern * torch.einsum("bkhd,hd->bhk", v, w)',
  'query dimension'),
 (10,
  'return sae.b_enc - sae.b_dec @ sae.W_enc',
  'return sae.b_enc - (sae.b_dec * sae.W_enc.T).sum()',
  'one sum over all'),
 (12,
  'lengths[:, q, 1:q + 1] = same[:, q, :q] * (1 + lengths[:, q - 1, :q])',
  'lengths[:, q, 1:q + 1] = (classes[:, q, None] == classes[:, :q]) * (1 + lengths[:, q - 1, :q])',
  'BOS'),
 (13, 'read[where].to(sae.b_dec.dtype)', 'read[where]', "SAE's type"),
 (14,
  'return float(ratio(np.arange(len(clean)))), bootstrap(ratio, len(clean))',
  'return torch.tensor(ratio(np.arange(len(clean)))), bootstrap(ratio, len(clean))',
  'float')]

RIGHT = [(1, 'is_plain = positions is None and (window is None or window >= n_keys)', 'is_plain = False'),
 (1,
  'scores = scale * torch.einsum("bqhd,bkhd->bhqk", q, k)',
  'scores = (scale * torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double())).to(q.dtype)'),
 (1,
  'scores = scores.masked_fill(~causal_mask(n_keys, window, q.device, positions), -torch.inf)\n',
  'scores = scores + torch.zeros_like(scores).masked_fill(~causal_mask(n_keys, window, q.device, '
  'positions), -1e9)\n'),
 (2,
  'return f @ self.W_dec + self.b_dec\n',
  'return (f[..., None] * self.W_dec).sum(-2) + self.b_dec\n'),
 (2,
  'return self.encoder_input(z) @ self.W_enc + self.b_enc\n',
  'return torch.einsum("...d,ds->...s", self.encoder_input(z), self.W_enc) + self.b_enc\n'),
 (2,
  'f = pre * (pre > self.threshold)\n'
  '        return keep_largest(f, self.top_k) if self.top_k else f\n',
  'f = torch.relu(pre) * (pre > self.threshold)\n'
  '        return keep_largest(f, self.top_k) if self.top_k else f\n'),
 (3, 'active = f != 0\n', 'active = f.bool()\n'),
 (3, 'd_b_dec = d_b_dec - sae.W_enc @ d_b_enc', 'd_b_dec -= (sae.W_enc * d_b_enc).sum(1)'),
 (3,
  'e.square().sum() / B, f.sum() / B',
  'F.mse_loss(sae.decode(f), target, reduction="sum") / B, f.norm(p=1, dim=-1).mean()'),
 (4,
  'sae.W_dec /= sae.W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-12)',
  'sae.W_dec.copy_(F.normalize(sae.W_dec, dim=-1))'),
 (4,
  'sae.W_dec /= sae.W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-12)',
  'sae.W_dec *= sae.W_dec.square().sum(1, keepdim=True).rsqrt()'),
 (4,
  'along = torch.einsum("id,id->i", gradient, sae.W_dec)\n'
  '    gradient.addcmul_(sae.W_dec, along[:, None], value=-1)',
  'for g, w in zip(gradient, sae.W_dec):\n        g.sub_((g @ w) * w)'),
 (5,
  'error = (sae(z) - target).square().sum(-1).cpu().double()           # (B,)',
  'error = F.mse_loss(sae(z), target, reduction="none").mean(-1).cpu().double()'),
 (5,
  'drawn = torch.multinomial(error.square(), n, replacement=True, generator=generator)',
  'drawn = torch.multinomial(error ** 2 / (error ** 2).sum(), n, replacement=True, '
  'generator=generator)'),
 (5,
  'drawn = torch.multinomial(error.square(), n, replacement=True, generator=generator)',
  'gumbel = -torch.log(-torch.log(torch.rand(n, len(error), generator=generator, '
  'dtype=torch.float64)))\n'
  '    drawn = (2 * error.log() + gumbel).argmax(1)'),
 (6, 'state["exp_avg"][index] = 0.0', 'state["exp_avg"][index] *= 0.0'),
 (6,
  '    live = (~dead).nonzero()[:, 0]\n'
  '    index = (slice(None), dead) if feature_dim == 1 else dead\n'
  '    mean = state["exp_avg_sq"].index_select(feature_dim, live).mean(feature_dim, '
  'keepdim=True)\n'
  '    state["exp_avg"][index] = 0.0\n'
  '    state["exp_avg_sq"][index] = mean.expand_as(state["exp_avg_sq"][index])\n',
  '    first, second = state["exp_avg"].movedim(feature_dim, 0), '
  'state["exp_avg_sq"].movedim(feature_dim, 0)\n'
  '    first[dead] = 0\n'
  '    second[dead] = second[~dead].mean(0)\n'),
 (6,
  '    live = (~dead).nonzero()[:, 0]\n'
  '    index = (slice(None), dead) if feature_dim == 1 else dead\n'
  '    mean = state["exp_avg_sq"].index_select(feature_dim, live).mean(feature_dim, '
  'keepdim=True)\n'
  '    state["exp_avg"][index] = 0.0\n'
  '    state["exp_avg_sq"][index] = mean.expand_as(state["exp_avg_sq"][index])\n',
  '    first, second = state["exp_avg"], state["exp_avg_sq"]\n'
  '    if feature_dim == 1:\n'
  '        first, second = first.T, second.T\n'
  '    live = [second[i].clone() for i in range(len(dead)) if not dead[i]]\n'
  '    mean = torch.stack(live).mean(0)\n'
  '    for i in range(len(dead)):\n'
  '        if dead[i]:\n'
  '            first[i] = 0\n'
  '            second[i] = mean\n'),
 (7, '    sae.b_enc[dead] = 0.0\n', '    sae.b_enc.masked_fill_(dead, 0.0)\n'),
 (7,
  '    if not dead.any() or not live.any():\n        return\n',
  '    if dead.all() or live.all():\n        return\n'),
 (7,
  '    centre = sae.b_dec if sae.subtracts_b_dec else mean_in\n'
  '    columns = F.normalize(z[drawn] - centre, dim=-1).T                  # (d_in,n_dead)\n'
  '    columns = 0.2 * sae.W_enc[:, live].norm(dim=0).mean() * columns\n'
  '    sae.W_dec[dead] = F.normalize(target[drawn] - sae.b_dec, dim=-1)\n'
  '    sae.W_enc[:, dead] = columns\n'
  '    sae.b_enc[dead] = 0.0\n'
  '    if not sae.subtracts_b_dec:                             # then the centre is still in the '
  'input\n'
  '        sae.b_enc[dead] -= centre @ columns\n',
  '    centre = sae.b_dec if sae.subtracts_b_dec else mean_in\n'
  '    size = 0.2 * torch.linalg.vector_norm(sae.W_enc[:, live], dim=0).mean()\n'
  '    for i, b in zip(dead.nonzero()[:, 0].tolist(), drawn.tolist()):\n'
  '        row = target[b] - sae.b_dec\n'
  '        column = z[b] - centre\n'
  '        sae.W_dec[i] = row / row.norm()\n'
  '        sae.W_enc[:, i] = size * column / column.norm()\n'
  '        sae.b_enc[i] = 0.0 if sae.subtracts_b_dec else -(centre @ sae.W_enc[:, i])\n'),
 (8,
  'return (ablated - sae).mean() / (ablated - clean).mean()',
  'return np.sum(ablated - sae) / np.sum(ablated - clean)'),
 (8,
  'return (ablated - sae).mean() / (ablated - clean).mean()',
  'return float((np.mean(ablated) - np.mean(sae)) / (np.mean(ablated) - np.mean(clean)))'),
 (8,
  '    next_token = at_positions(tokens, q + 1)\n'
  '    losses = F.cross_entropy(logits.float().flatten(0, 1), next_token.flatten(), '
  'reduction="none")\n'
  '    return losses.unflatten(0, q.shape).mean(-1)\n',
  '    log_p = logits.float().log_softmax(-1)\n'
  '    return -log_p.gather(-1, tokens.gather(1, q + 1)[..., None]).squeeze(-1).mean(1)\n'),
 (9,
  'return norms / norms.sum(-1, keepdim=True).clamp_min(1e-30)',
  'return norms / (norms.sum(-1, keepdim=True) + 1e-8)'),
 (9,
  'return norms / norms.sum(-1, keepdim=True).clamp_min(1e-30)',
  'return (norms / norms.sum(-1, keepdim=True)).nan_to_num(0.0)'),
 (9,
  'norms = W_dec.unflatten(-1, (n_heads, -1)).norm(dim=-1)',
  'norms = W_dec.reshape(*W_dec.shape[:-1], n_heads, -1).pow(2).sum(-1).sqrt()'),
 (10, 'return sae.b_enc - sae.b_dec @ sae.W_enc', 'return sae.b_enc - sae.W_enc.T @ sae.b_dec'),
 (10,
  'return sae.b_enc - sae.b_dec @ sae.W_enc',
  'return sae.b_enc - torch.einsum("d,di->i", sae.b_dec, sae.W_enc)'),
 (10,
  '    w = w_enc.unflatten(0, (v.shape[2], -1))                            # (H,d_head)\n'
  '    return pattern * torch.einsum("bkhd,hd->bhk", v, w)[:, :, None]     # d_head is summed '
  'first\n',
  '    H, d = v.shape[2:]\n'
  '    return torch.stack([pattern[:, h] * (v[:, :, h] @ w_enc[h * d:(h + 1) * d])[:, None] for '
  'h in range(H)], 1)\n'),
 (11,
  'seen = (components.position <= position).nonzero()[:, 0]            # (S,)',
  'seen = torch.arange(len(components.position))'),
 (11,
  'own_bias = feature_bias(sae)[feature, None]                         # (1,)',
  'own_bias = (sae.b_enc[feature] - sae.b_dec @ sae.W_enc[:, feature])[None]'),
 (11,
  'brought = attention / scale * (direction @ components.vector[seen].T)   # (H,S)',
  'v = torch.einsum("sm,hmd->hsd", components.vector[seen], m.W_V)\n'
  '    brought = attention / scale * torch.einsum("hsd,hd->hs", v, w)'),
 (12, 'lengths = classes.new_zeros(B, T, T)', 'lengths = torch.zeros(B, T, T)'),
 (12,
  '    B, T = classes.shape\n'
  '    same = (classes[:, :, None] == classes[:, None]) & (classes >= 0)[:, None]          # '
  '(B,q,k)\n'
  '    lengths = classes.new_zeros(B, T, T)\n'
  '    for q in range(1, T):\n'
  '        lengths[:, q, 1:q + 1] = same[:, q, :q] * (1 + lengths[:, q - 1, :q])\n'
  '    return lengths\n',
  '    B, T = classes.shape\n'
  '    lengths = classes.new_zeros(B, T, T)\n'
  '    for b in range(B):\n'
  '        c = classes[b].tolist()\n'
  '        for q in range(1, T):\n'
  '            for k in range(1, q + 1):\n'
  '                if c[q] == c[k - 1] and c[q] != -1:\n'
  '                    lengths[b, q, k] = 1 + lengths[b, q - 1, k - 1]\n'
  '    return lengths\n'),
 (12,
  '    B, T = classes.shape\n'
  '    same = (classes[:, :, None] == classes[:, None]) & (classes >= 0)[:, None]          # '
  '(B,q,k)\n'
  '    lengths = classes.new_zeros(B, T, T)\n'
  '    for q in range(1, T):\n'
  '        lengths[:, q, 1:q + 1] = same[:, q, :q] * (1 + lengths[:, q - 1, :q])\n'
  '    return lengths\n',
  '    B, T = classes.shape\n'
  '    before = torch.cat([torch.full_like(classes[:, :1], -1), classes[:, :-1]], 1)       # the '
  'token before each key\n'
  '    same = (classes[:, :, None] == before[:, None]) & (before != -1)[:, None]\n'
  '    same = same.tril()\n'
  '    lengths, run = same.long(), same\n'
  '    for _ in range(1, T):\n'
  '        run = F.pad(run[:, :-1, :-1], (1, 0, 1, 0)) & same\n'
  '        lengths = lengths + run\n'
  '    return lengths\n'),
 (13,
  'edited[where] += ((value - f_i) * sae.W_dec[i]).to(written.dtype)',
  'edited[where] = (edited[where].to(sae.b_dec.dtype) + (value - f_i) * '
  'sae.W_dec[i]).to(written.dtype)'),
 (13,
  'edited[where] += ((value - f_i) * sae.W_dec[i]).to(written.dtype)',
  'changed = f.scatter(1, i[:, None], value)\n'
  '    edited[where] += (sae.decode(changed) - sae.decode(f)).to(written.dtype)'),
 (13,
  '    row, _ = where.nonzero(as_tuple=True)                   # (n,) of each position to edit\n'
  '    feature_of_row = torch.as_tensor(feature, device=read.device).expand(len(read))     # '
  '(B,)\n'
  '    i = feature_of_row[row]                                 # (n,) the feature that goes '
  'there\n'
  '    f = sae.encode(read[where].to(sae.b_dec.dtype))         # (n,d_sae)\n'
  '    f_i = f.gather(1, i[:, None])                           # (n,1)\n'
  '    edited = written.clone()\n'
  '    edited[where] += ((value - f_i) * sae.W_dec[i]).to(written.dtype)\n'
  '    return edited\n',
  '    f = sae.encode(read.to(sae.b_dec.dtype))\n'
  '    i = torch.as_tensor(feature, device=read.device).expand(len(read))\n'
  '    target = f.clone()\n'
  '    target[torch.arange(len(read)), :, i] = value\n'
  '    change = (target - f) @ sae.W_dec\n'
  '    return written + change.masked_fill(~where[..., None], 0.0).to(written.dtype)\n'),
 (14,
  '_, (low, _) = mean_with_ci(clean - zero)',
  'low, _ = bootstrap(lambda drawn: (clean - zero)[drawn].mean(), len(clean), seed=5)'),
 (14,
  'return float(ratio(np.arange(len(clean)))), bootstrap(ratio, len(clean))',
  'return float(ratio(np.arange(len(clean)))), np.array(bootstrap(ratio, len(clean)))'),
 (14,
  'return float(ratio(np.arange(len(clean)))), bootstrap(ratio, len(clean))',
  'return (patched - zero).mean() / (clean - zero).mean(), tuple(bootstrap(ratio, len(clean), '
  'samples=5000, seed=3))')]
